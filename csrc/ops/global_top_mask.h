// The arguments of global_top_mask and of its steps over several processes, checked.
#pragma once

#include "../kernels/selection.h"
#include "checks.h"

namespace entropy_rl {

enum class TopScope { kBatch, kSequence, kGroup };
// The algorithm on CUDA; all give the same mask. The CPU has one algorithm.
enum class TopAlgorithm { kAuto, kSort, kRadix };

struct TopMaskArguments {
  Tensor entropy;  // contiguous, as many elements as rows * columns
  Tensor mask;     // bool, contiguous, same shape
  double ratio = 0;
  TopRule rule;
  TopScope scope;
  TopAlgorithm algorithm;
  int64_t rows = 0;  // scope batch: one row with all tokens
  int64_t columns = 0;
  std::optional<Tensor> group_ids;  // [rows] int64, contiguous; scope group only

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
    rows = columns > 0 ? entropy.numel() / columns : 0;
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
    entropy = contiguous_tensor(entropy);
    mask = as_bool_mask("response_mask", response_mask);
  }

  // Bool, contiguous, the shape of entropy.
  Tensor new_mask() const { return new_tensor(entropy, shape_of(entropy), ScalarType::Bool); }
};

// ---- The steps for values that several processes hold ----

// The values of one process.
struct ProcessValues {
  Tensor values;  // contiguous
  Tensor mask;    // bool, contiguous, same shape

  ProcessValues(const Tensor& values_in, const Tensor& mask_in) : values(values_in), mask(mask_in) {
    check_floating("values", values);
    check_shape("mask", mask, shape_of(values), "the shape of values");
    check_same_device("mask", mask, "values", values);
    values = contiguous_tensor(values);
    mask = as_bool_mask("mask", mask);
  }
  int key_bits() const { return values.scalar_type() == ScalarType::Double ? 64 : 32; }
};

inline void check_number(const char* name, const Tensor& tensor, ScalarType dtype,
                         const char* other_name, const Tensor& other) {
  check(tensor.scalar_type() == dtype && tensor.dim() == 0, name, " is ",
        dtype_name(tensor.scalar_type()), " of shape ", shape_name(shape_of(tensor)),
        "; it must be one ", dtype_name(dtype));
  check_same_device(name, tensor, other_name, other);
}

// The digit that a step counts: the one after the digits of `key`.
struct DigitArguments {
  int shift;
  int bits;
  int pass;  // how many digits are above it

  DigitArguments(int64_t shift_in, int key_bits, const std::optional<Tensor>& key,
                 const Tensor& values) {
    const bool valid = shift_in == 0 || (shift_in > 0 && shift_in < key_bits &&
                                         (key_bits - shift_in) % kDigitBits == 0);
    check(valid, "shift is ", shift_in, "; it must be 0 or ", key_bits, " less a multiple of ",
          kDigitBits);
    shift = static_cast<int>(shift_in);
    bits = digit_bits(key_bits, shift);
    pass = (key_bits - shift - bits) / kDigitBits;
    check(key.has_value() == (pass > 0), "key is ", key ? "given" : "None", " with shift ", shift,
          "; it must be None for the first digit of a key, and is needed for others");
    if (key) check_number("key", *key, ScalarType::Long, "values", values);
  }
};

// How many keys of all processes have each value of a digit.
struct CountsArguments {
  Tensor counts;  // [digits] int64, contiguous
  int digits;

  CountsArguments(const Tensor& counts_in, const std::optional<Tensor>& key, const Tensor& k,
                  int64_t shift)
      : counts(counts_in) {
    check(counts.scalar_type() == ScalarType::Long, "counts is ", dtype_name(counts.scalar_type()),
          "; it must be int64");
    check(counts.dim() == 1 && counts.numel() >= 1 && counts.numel() <= kDigits,
          "counts has shape ", shape_name(shape_of(counts)), "; it must be [1] to [", kDigits, "]");
    check(shift >= 0 && shift < 64, "shift is ", shift, "; it must be in [0, 64)");
    if (key) check_number("key", *key, ScalarType::Long, "counts", counts);
    check_number("k", k, ScalarType::Long, "counts", counts);
    counts = contiguous_tensor(counts);
    digits = static_cast<int>(counts.numel());
  }
};

inline void check_found(const ProcessValues& in, const Tensor& key, const Tensor& k,
                        const std::optional<Tensor>& ties, int64_t process,
                        const std::optional<Tensor>& next_key,
                        const std::optional<Tensor>& weight) {
  check_number("key", key, ScalarType::Long, "values", in.values);
  check_number("k", k, ScalarType::Long, "values", in.values);
  if (ties) {
    check(!next_key, "next_key is given with ties; it must be None with them");
    check(ties->scalar_type() == ScalarType::Long && ties->dim() == 1, "ties is ",
          dtype_name(ties->scalar_type()), " of shape ", shape_name(shape_of(*ties)),
          "; it must be int64, one number a process");
    check_same_device("ties", *ties, "values", in.values);
    check(process >= 0 && process < ties->numel(), "process is ", process, "; it must be in [0, ",
          ties->numel(), "), the processes of ties");
  }
  check(next_key.has_value() == weight.has_value(), "next_key is ", next_key ? "given" : "None",
        " and weight is ", weight ? "given" : "None", "; both are needed for a quantile");
  if (next_key) {
    const ScalarType dtype = in.key_bits() == 64 ? ScalarType::Long : ScalarType::Int;
    check_number("next_key", *next_key, dtype, "values", in.values);
    check_number("weight", *weight, ScalarType::Double, "values", in.values);
  }
}

}  // namespace entropy_rl
