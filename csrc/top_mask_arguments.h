// Checks and normalises the arguments of global_top_mask for both backends.
#pragma once

#include "checks.h"
#include "kernels/selection.h"

namespace entropy_rl {

enum class TopScope { kBatch, kSequence, kGroup };
// On CUDA; all give the same mask. The CPU has one.
enum class TopAlgorithm { kAuto, kSort, kRadix };

struct TopMaskArguments {
  Tensor entropy;  // contiguous, as many elements as rows * columns
  Tensor mask;     // bool, contiguous, same shape
  double ratio = 0;
  TopRule rule;
  TopScope scope;
  TopAlgorithm algorithm;
  int64_t rows = 1;  // scope batch: one row that holds everything
  int64_t columns = 0;
  std::optional<Tensor> group_ids;  // [rows] int64, contiguous; scope group alone

  TopMaskArguments(const Tensor& entropy_in, const Tensor& response_mask, const Tensor& top_ratio,
                   const std::string& rule_name, const std::string& scope_name,
                   const std::optional<Tensor>& group_ids_in, const std::string& algorithm_name)
      : entropy(entropy_in),
        mask(response_mask),
        rule(parse_choice<TopRule>("rule", rule_name,
                                   {{"topk", TopRule::kTopK},
                                    {"threshold", TopRule::kThreshold},
                                    {"quantile", TopRule::kQuantile}})),
        scope(parse_choice<TopScope>("scope", scope_name,
                                     {{"batch", TopScope::kBatch},
                                      {"sequence", TopScope::kSequence},
                                      {"group", TopScope::kGroup}})),
        algorithm(parse_choice<TopAlgorithm>("algorithm", algorithm_name,
                                             {{"auto", TopAlgorithm::kAuto},
                                              {"sort", TopAlgorithm::kSort},
                                              {"radix", TopAlgorithm::kRadix}})) {
    check_floating("entropy", entropy);
    check(entropy.dim() >= 1, "entropy has no dimension; it must be [..., sequence]");
    std::vector<int64_t> row_shape = shape_of(entropy);
    check_shape("response_mask", response_mask, row_shape, "the shape of entropy");
    check_same_device("response_mask", response_mask, "entropy", entropy);
    check(is_host_number(top_ratio), "top_ratio is a tensor; it must be a number");
    ratio = host_number(top_ratio);
    check(ratio > 0 && ratio <= 1, "top_ratio is ", ratio, "; it must be in (0, 1]");

    columns = row_shape.back();
    row_shape.pop_back();
    for (const int64_t size : row_shape) rows *= size;
    if (scope == TopScope::kGroup) {
      check(group_ids_in.has_value(), "group_ids is None; scope 'group' needs it");
      check(is_integer(group_ids_in->scalar_type()), "group_ids is ",
            dtype_name(group_ids_in->scalar_type()), "; it must be an integer dtype");
      check_shape("group_ids", *group_ids_in, row_shape, "one id for each row of entropy");
      check_same_device("group_ids", *group_ids_in, "entropy", entropy);
      group_ids = as_contiguous(*group_ids_in, ScalarType::Long);
    } else {
      check(!group_ids_in.has_value(), "group_ids is given with scope '", scope_name,
            "'; it must be None unless scope is 'group'");
    }
    if (scope == TopScope::kBatch) {
      columns *= rows;
      rows = 1;
    }
    entropy = torch::stable::contiguous(entropy);
    mask = as_bool_mask(response_mask);
  }

  // Bool, contiguous, the shape of entropy.
  Tensor new_mask() const {
    return torch::stable::new_empty(entropy, shape_of(entropy), ScalarType::Bool);
  }
};

}  // namespace entropy_rl
