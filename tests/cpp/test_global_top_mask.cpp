// Keys, counts and thresholds of csrc/kernels/selection.h, and the kernels of sort_select.cuh and
// radix_select.cuh under the SIMT shim, against the rules applied to sorted values. std::sort
// replaces CUB's sort of the tiles, and std::stable_sort its sort of the rows.
#include "kernels/radix_select.cuh"
#include "kernels/sort_select.cuh"

#include <gtest/gtest.h>

#include <deque>
#include <limits>
#include <map>
#include <numeric>
#include <type_traits>

namespace entropy_rl {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// ---- selection.h ----

template <class Value>
class SelectionKeyTest : public ::testing::Test {};
using Values = ::testing::Types<float, double>;
TYPED_TEST_SUITE(SelectionKeyTest, Values);

TYPED_TEST(SelectionKeyTest, KeysAreOrderedAsTheirValuesAndLeadBackToThem) {
  using Limits = std::numeric_limits<TypeParam>;
  const std::vector<TypeParam> ascending = {
      -Limits::infinity(),   Limits::lowest(),      -1,
      -Limits::min(),        -Limits::denorm_min(), 0,
      Limits::denorm_min(),  Limits::min(),         1,
      1 + Limits::epsilon(), Limits::max(),         Limits::infinity()};
  for (size_t i = 0; i < ascending.size(); ++i) {
    const auto key = selection_key(ascending[i]);
    EXPECT_EQ(selection_value(key), ascending[i]);
    if (i > 0) {
      EXPECT_LT(selection_key(ascending[i - 1]), key);
    }
  }
}

TYPED_TEST(SelectionKeyTest, NaNOfEitherSignIsTheHighestKey) {
  const TypeParam nan = std::numeric_limits<TypeParam>::quiet_NaN();
  using Key = selection_key_t<TypeParam>;
  EXPECT_EQ(selection_key(nan), kNaNKey<Key>);
  EXPECT_EQ(selection_key(-nan), kNaNKey<Key>);
  EXPECT_LT(selection_key(std::numeric_limits<TypeParam>::infinity()), kNaNKey<Key>);
}

TYPED_TEST(SelectionKeyTest, ZerosShareAKeyAndNoValueHasTheIneligibleOne) {
  using Key = selection_key_t<TypeParam>;
  EXPECT_EQ(selection_key(TypeParam{-0.0}), selection_key(TypeParam{0.0}));
  EXPECT_GT(selection_key(-std::numeric_limits<TypeParam>::infinity()), kIneligibleKey<Key>);
}

TEST(TopCount, IsTheAuthorsExpressionBetweenOneAndN) {
  EXPECT_EQ(top_count(1, 1e-9), 1);
  EXPECT_EQ(top_count(10, 0.2), 2);
  EXPECT_EQ(top_count(11, 0.2), 3);
  EXPECT_EQ(top_count(10, 1.0), 10);
  // 1e-5 above an integer is below the ceiling's 1e-4.
  EXPECT_EQ(top_count(10, 0.200001), 2);
  // n + 0.9999 rounds to n + 1 once a double's last place is that coarse.
  EXPECT_EQ(top_count(int64_t{1} << 41, 1.0), int64_t{1} << 41);
}

TEST(QuantileKey, LiesBetweenItsNeighbours) {
  const auto quantile = [](double low, double high, double weight) {
    return selection_value(quantile_key(selection_key(low), selection_key(high), weight));
  };
  EXPECT_EQ(quantile(1, 3, 0.0), 1);
  EXPECT_EQ(quantile(1, 3, 0.25), 1.5);
  EXPECT_EQ(quantile(1, kInfinity, 0.25), kInfinity);
  EXPECT_EQ(quantile(-kInfinity, 3, 0.25), -kInfinity);
  EXPECT_EQ(quantile(kInfinity, kInfinity, 0.5), kInfinity);
  EXPECT_TRUE(std::isnan(quantile(1, kNaN, 0.5)));
  // Their difference overflows; the threshold stays within them.
  EXPECT_EQ(quantile(-1.7e308, 1.7e308, 0.5), 1.7e308);
}

TEST(QuantileKey, RoundsTheProductBeforeTheSum) {
  // Python, and torch on any device, round a step of half a last place down to 1; one rounding of
  // the exact product and sum would give the next number.
  const double low = 1.0, high = 1.0 + 3 * 0x1p-52;
  const uint64_t key = quantile_key(selection_key(low), selection_key(high), 0x1.5555555555556p-3);
  EXPECT_EQ(selection_value(key), low);
}

TEST(QuantileKey, IsRoundedToTheTypeOfItsNeighbours) {
  const float low = 1.0f, high = 1.0f + 0x1p-23f;
  const uint32_t key = quantile_key(selection_key(low), selection_key(high), 0.75);
  EXPECT_EQ(selection_value(key), high);
}

TYPED_TEST(SelectionKeyTest, SignedKeysHaveTheOrderOfUnsignedOnes) {
  using Key = selection_key_t<TypeParam>;
  const Key ascending[] = {kIneligibleKey<Key>, selection_key(TypeParam{-1}),
                           selection_key(TypeParam{0}), selection_key(TypeParam{1}), kNaNKey<Key>};
  for (int i = 0; i < 5; ++i) {
    EXPECT_EQ(unsigned_key<Key>(signed_key(ascending[i])), ascending[i]);
    if (i > 0) {
      EXPECT_LT(signed_key(ascending[i - 1]), signed_key(ascending[i]));
    }
  }
}

TEST(ProcessCut, GivesTiesToTheFirstProcesses) {
  const FoundKey found{selection_key(2.0f), 10};
  const auto kept = [&](int64_t before, int64_t own) {
    const ProcessCut<uint32_t> cut = cut_ties<uint32_t>(found, before, own);
    EXPECT_EQ(cut.key, selection_key(2.0f));
    EXPECT_EQ(cut.lowest, 2);
    return cut.keeps_all_ties ? own : cut.ties;
  };
  EXPECT_EQ(kept(0, 3), 3);
  EXPECT_EQ(kept(3, 7), 7);
  EXPECT_EQ(kept(3, 8), 7);
  EXPECT_EQ(kept(10, 5), 0);
  EXPECT_EQ(kept(15, 5), 0);
  EXPECT_EQ(kept(15, 0), 0);
}

TEST(ProcessCut, KeepsNothingForKOfZero) {
  const FoundKey none{-1, 0};
  const FoundKey garbage{-1, std::numeric_limits<int64_t>::min()};
  for (const ProcessCut<uint64_t>& cut :
       {cut_at<uint64_t>(none), cut_ties<uint64_t>(none, 0, 4),
        cut_quantile<uint64_t>(none, 5, 0.5), cut_ties<uint64_t>(garbage, 3, 4)}) {
    EXPECT_EQ(cut.key, kNaNKey<uint64_t>);
    EXPECT_EQ(cut.ties, 0);
    EXPECT_FALSE(cut.keeps_all_ties);
    EXPECT_EQ(cut.lowest, 0);
  }
}

TEST(ProcessCut, OfAQuantileLeadsToTheNextValueUp) {
  const uint64_t one = selection_key(1.0), three = selection_key(3.0);
  const auto cut = [&](int64_t k, uint64_t next, double weight) {
    return cut_quantile<uint64_t>({static_cast<int64_t>(one), k}, next, weight);
  };
  EXPECT_EQ(cut(1, three, 0.0).lowest, 1);
  EXPECT_EQ(cut(1, three, 0.25).key, selection_key(1.5));
  EXPECT_EQ(cut(1, three, 0.25).lowest, 3);
  EXPECT_EQ(cut(2, three, 0.25).key, one);  // the next value up is another 1
  EXPECT_EQ(cut(2, three, 0.25).lowest, 1);
  EXPECT_EQ(cut(1, kNaNKey<uint64_t>, 0.25).key, kNaNKey<uint64_t>);
  EXPECT_EQ(cut(1, kNaNKey<uint64_t>, 0.25).lowest, kInfinity);
}

// ---- The kernels ----

template <class Element>
Element element(double value) {
  Element result;
  store_value(static_cast<accumulate_t<Element>>(value), &result);
  return result;
}

struct Problem {
  int64_t rows;
  int64_t columns;
  std::vector<double> entropy;  // [rows, columns]
  std::vector<bool> mask;       // [rows, columns]
  std::vector<int64_t> ids;     // [rows]; empty: every row by itself

  int64_t segment(int64_t row) const { return ids.empty() ? row : ids[row]; }
};

// The values are few, so that ties run across tiles and rows.
Problem make_problem(int64_t rows, int64_t columns, int groups, double share, unsigned seed) {
  std::mt19937 random(seed);
  const double special[] = {kNaN, -kNaN, kInfinity, -kInfinity, -0.0, 0.0};
  Problem problem{rows, columns, {}, {}, {}};
  for (int64_t i = 0; i < rows * columns; ++i) {
    problem.entropy.push_back(random() % 64 == 0 ? special[random() % 6]
                                                 : static_cast<double>(random() % 100) / 8);
    problem.mask.push_back(random() < share * 4294967296.0);
  }
  for (int64_t row = 0; groups > 0 && row < rows; ++row) problem.ids.push_back(random() % groups);
  return problem;
}

bool ranks_above(double a, double b) {
  return std::isnan(a) ? !std::isnan(b) : !std::isnan(b) && a > b;
}

// Which of a segment's values are kept; `count` replaces the ratio's k where it is not null.
std::vector<bool> keep(const std::vector<double>& values, const SelectionRule& rule, bool single) {
  const int64_t n = values.size();
  std::vector<bool> kept(n, false);
  if (n == 0) return kept;
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return ranks_above(values[a], values[b]); });
  const double product = static_cast<double>(n) * rule.ratio;
  int64_t k = std::min(n, std::max<int64_t>(1, static_cast<int64_t>(product + 0.9999)));
  if (rule.count) k = std::min(n, std::max<int64_t>(0, *rule.count));
  if (rule.rule == TopRule::kTopK) {
    for (int64_t i = 0; i < k; ++i) kept[order[i]] = true;
    return kept;
  }
  double threshold = values[order[k - 1]];
  if (rule.rule == TopRule::kQuantile) {
    const double position = (1.0 - rule.ratio) * static_cast<double>(n - 1);
    const int64_t lower = static_cast<int64_t>(position);
    const double low = values[order[n - 1 - lower]];
    const double high = values[order[std::max<int64_t>(0, n - 2 - lower)]];
    const double weight = position - static_cast<double>(lower);
    threshold = low;
    if (weight > 0 && low != high && low != -kInfinity) threshold = low + weight * (high - low);
    if (single) threshold = static_cast<float>(threshold);
  }
  for (int64_t i = 0; i < n; ++i) kept[i] = !ranks_above(threshold, values[i]);
  return kept;
}

std::vector<uint8_t> expected_mask(const Problem& problem, const SelectionRule& rule, bool single) {
  std::map<int64_t, std::vector<int64_t>> members;  // segment -> flat indices
  for (int64_t i = 0; i < problem.rows * problem.columns; ++i) {
    if (problem.mask[i]) members[problem.segment(i / problem.columns)].push_back(i);
  }
  std::vector<uint8_t> mask(problem.rows * problem.columns, 0);
  for (const auto& [segment, indices] : members) {
    std::vector<double> values;
    for (const int64_t i : indices) values.push_back(problem.entropy[i]);
    const std::vector<bool> kept = keep(values, rule, single);
    for (size_t i = 0; i < indices.size(); ++i) mask[indices[i]] = kept[i];
  }
  return mask;
}

// CUB's sort; radix select with a block a segment, with a block a tile, and with both, where only
// segments of up to kBlockKeys keys are a block's.
enum class Algorithm { kSort, kRadixSegments, kRadixTiles, kRadixBoth };
constexpr Algorithm kAlgorithms[] = {Algorithm::kSort, Algorithm::kRadixSegments,
                                     Algorithm::kRadixTiles, Algorithm::kRadixBoth};
constexpr int64_t kBlockKeys = 750;

template <class Keys>
void run_radix(const Keys& keys, const int64_t* ids, const int64_t* row_order, int64_t rows,
               int64_t columns, const SelectionRule& rule, Algorithm algorithm, uint8_t* mask) {
  using Key = typename Keys::Key;
  const int threads = 64;
  simt::Buffer<SegmentRows> groups(ids ? rows : 0);
  const SegmentRows* segments = ids ? groups.data() : nullptr;
  if (ids) {
    simt::launch(rows / threads + 1, threads, segment_rows_kernel<int64_t>, ids, rows,
                 groups.data());
  }
  const int64_t block_keys = algorithm == Algorithm::kRadixSegments ? rows * columns
                             : algorithm == Algorithm::kRadixTiles  ? 0
                                                                    : kBlockKeys;
  if (columns <= block_keys) {
    const RadixInputs<Keys> in{keys, segments,  row_order, TileLayout(rows, columns),
                               rule, block_keys};
    const int blocks = 2;  // fewer than segments, so that a block takes several
    simt::launch(blocks, threads, radix_segment_kernel<Keys>, in, mask);
  }
  if ((ids ? rows * columns : columns) <= block_keys) return;
  const RadixInputs<Keys> in{keys, segments,  row_order, TileLayout(rows, columns, 1024),
                             rule, block_keys};
  constexpr int kPasses = Digit<Key>::kPasses;
  const int64_t places = in.places();
  simt::Buffer<uint32_t> histograms(std::vector<uint32_t>(kPasses * places * kDigits, 0));
  simt::Buffer<RadixCut<Key>> cuts(kPasses * places);
  const unsigned tiles = in.layout.tiles();
  simt::Buffer<Key> next_keys(tiles);
  simt::Buffer<uint32_t> turns(std::vector<uint32_t>(places, 0));
  simt::Buffer<uint32_t> tile_ties(std::vector<uint32_t>(tiles, 0));
  const RadixState<Key> state{histograms.data(), cuts.data(),      next_keys.data(),
                              turns.data(),      tile_ties.data(), places};
  for (int pass = 0; pass < kPasses; ++pass) {
    simt::launch(tiles, threads, radix_histogram_kernel<Keys>, in, state, pass);
  }
  simt::launch(tiles, threads, radix_mask_kernel<Keys>, in, state, mask);
}

template <class Element>
std::vector<uint8_t> run_kernels(const Problem& problem, const SelectionRule& rule,
                                 Algorithm algorithm) {
  using Key = selection_key_t<accumulate_t<Element>>;
  // Fewer blocks than tiles or rows, so that a block takes several.
  const int blocks = 2, threads = 64;
  const TileLayout layout(problem.rows, problem.columns);
  const size_t n = problem.rows * problem.columns;

  simt::Buffer<Element> entropy(n);
  simt::Buffer<bool> mask(n);
  for (size_t i = 0; i < n; ++i) {
    entropy[i] = element<Element>(problem.entropy[i]);
    mask[i] = problem.mask[i];
  }
  simt::Buffer<int64_t> row_order(problem.rows), ids(problem.rows);
  simt::launch(problem.rows / threads + 1, threads, row_indices_kernel<int64_t>, problem.rows,
               row_order.data());
  std::stable_sort(row_order.begin(), row_order.end(),
                   [&](int64_t a, int64_t b) { return problem.segment(a) < problem.segment(b); });
  for (int64_t row = 0; row < problem.rows; ++row) ids[row] = problem.segment(row_order[row]);
  int64_t* ids_or_null = problem.ids.empty() ? nullptr : ids.data();
  int64_t* order_or_null = problem.ids.empty() ? nullptr : row_order.data();

  simt::Buffer<uint8_t> result(n);
  if (algorithm != Algorithm::kSort) {
    run_radix(EntropyKeys<Element>{entropy.data(), mask.data()}, ids_or_null, order_or_null,
              problem.rows, problem.columns, rule, algorithm, result.data());
    return {result.begin(), result.end()};
  }
  simt::Buffer<Key> keys(n);
  simt::launch(blocks, threads, selection_keys_kernel<Element>, entropy.data(), mask.data(),
               order_or_null, layout, keys.data());
  simt::Buffer<Key> sorted(n);
  std::copy(keys.begin(), keys.end(), sorted.begin());
  for (int64_t tile = 0; tile < layout.tiles(); ++tile) {
    Key* begin = sorted.data() + layout.begin(tile);
    std::sort(begin, begin + layout.size(tile));
  }
  simt::Buffer<TileRange> ranges(layout.tiles());
  simt::Buffer<TileCut<Key>> cuts(layout.tiles());
  simt::launch(blocks, threads, selection_cut_kernel<Key>, sorted.data(), ids_or_null, layout, rule,
               ranges.data(), cuts.data());
  simt::launch(blocks, threads, selection_mask_kernel<Key>, keys.data(), cuts.data(), order_or_null,
               layout, result.data());
  return {result.begin(), result.end()};
}

template <class Element>
void expect_equal(const Problem& problem, const SelectionRule& rule) {
  Problem rounded = problem;
  for (double& value : rounded.entropy) value = load_value(element<Element>(value));
  const bool single = !std::is_same_v<Element, double>;
  const std::vector<uint8_t> expected = expected_mask(rounded, rule, single);
  for (const Algorithm algorithm : kAlgorithms) {
    EXPECT_EQ(run_kernels<Element>(problem, rule, algorithm), expected)
        << "rule " << static_cast<int>(rule.rule) << ", ratio " << rule.ratio << ", algorithm "
        << static_cast<int>(algorithm);
  }
}

constexpr TopRule kRules[] = {TopRule::kTopK, TopRule::kThreshold, TopRule::kQuantile};

template <class Element>
class GlobalTopMaskTest : public ::testing::Test {};
using Elements = ::testing::Types<float, double, BFloat16, Half>;
TYPED_TEST_SUITE(GlobalTopMaskTest, Elements);

TYPED_TEST(GlobalTopMaskTest, OneSegmentOfSeveralTiles) {
  const Problem problem = make_problem(1, 2 * kTileKeys + 77, 0, 0.7, 1);
  for (const TopRule rule : kRules) expect_equal<TypeParam>(problem, {rule, 0.2, nullptr});
}

TYPED_TEST(GlobalTopMaskTest, EveryRowASegment) {
  const Problem problem = make_problem(3, 45, 0, 0.5, 2);
  for (const TopRule rule : kRules) expect_equal<TypeParam>(problem, {rule, 0.3, nullptr});
}

TYPED_TEST(GlobalTopMaskTest, GroupsOfScatteredRows) {
  const Problem problem = make_problem(7, 45, 2, 0.5, 3);
  for (const TopRule rule : kRules) expect_equal<TypeParam>(problem, {rule, 0.3, nullptr});
}

TEST(GlobalTopMask, GroupsOfManyKeysAndOfFew) {
  // Groups of 1 row, of exactly kBlockKeys keys, of more, and of several times as many.
  constexpr int64_t kColumns = 250;
  const int64_t rows_of_group[] = {1, kBlockKeys / kColumns, kBlockKeys / kColumns + 1, 1, 8, 4, 2};
  Problem problem = make_problem(23, kColumns, 1, 0.8, 14);
  problem.ids.clear();
  int64_t group = 0;
  for (const int64_t rows : rows_of_group) {
    problem.ids.insert(problem.ids.end(), rows, group++);
  }
  ASSERT_EQ(problem.ids.size(), 23u);
  for (const bool scattered : {false, true}) {
    if (scattered) std::shuffle(problem.ids.begin(), problem.ids.end(), std::mt19937(15));
    for (const TopRule rule : kRules) expect_equal<float>(problem, {rule, 0.2, nullptr});
  }
}

TEST(GlobalTopMask, GroupsOfRowsOfSeveralTiles) {
  const Problem problem = make_problem(4, kTileKeys + 5, 2, 0.6, 4);
  for (const TopRule rule : kRules) expect_equal<float>(problem, {rule, 0.2, nullptr});
}

TEST(GlobalTopMask, MoreTilesThanThreadsOfABlock) {
  const Problem problem = make_problem(150, 3, 1, 0.6, 5);  // a tile a row, one group
  for (const TopRule rule : kRules) expect_equal<float>(problem, {rule, 0.2, nullptr});
}

TEST(GlobalTopMask, QuantileBetweenDistinctValues) {
  // Some tiles have nothing above the lower neighbour; the last of them ends the buffer.
  Problem problem = make_problem(6, 9, 2, 0.8, 12);
  std::iota(problem.entropy.begin(), problem.entropy.end(), 0.0);
  std::shuffle(problem.entropy.begin(), problem.entropy.end(), std::mt19937(12));
  for (const double ratio : {0.01, 0.1, 0.3, 0.9}) {
    expect_equal<float>(problem, {TopRule::kQuantile, ratio, nullptr});
  }
}

TEST(GlobalTopMask, RowsOfExactlyOneTile) {
  const Problem problem = make_problem(2, kTileKeys, 0, 0.6, 6);
  expect_equal<float>(problem, {TopRule::kTopK, 0.2, nullptr});
}

TEST(GlobalTopMask, OneToken) {
  for (const double share : {0.0, 1.0}) {
    const Problem problem = make_problem(1, 1, 0, share, 7);
    for (const TopRule rule : kRules) expect_equal<float>(problem, {rule, 0.2, nullptr});
  }
}

TEST(GlobalTopMask, NothingEligible) {
  const Problem problem = make_problem(3, 40, 0, 0.0, 8);
  for (const TopRule rule : kRules) expect_equal<float>(problem, {rule, 1.0, nullptr});
}

TEST(GlobalTopMask, EqualEntropiesGoToTheLowestIndex) {
  Problem problem = make_problem(1, kTileKeys + 300, 0, 1.0, 9);
  std::fill(problem.entropy.begin(), problem.entropy.end(), 1.5);
  // The last tie kept is before, at and after the end of the first tile, and within the second.
  for (const int64_t k : {kTileKeys - 1, kTileKeys, kTileKeys + 1, kTileKeys + 100}) {
    simt::Buffer<int64_t> count(std::vector<int64_t>{k});
    for (const Algorithm algorithm : kAlgorithms) {
      const std::vector<uint8_t> mask =
          run_kernels<float>(problem, {TopRule::kTopK, 0.0, count.data()}, algorithm);
      for (int64_t i = 0; i < problem.columns; ++i) EXPECT_EQ(mask[i], i < k) << i;
    }
  }
}

TEST(GlobalTopMask, CountsGivenOnTheDevice) {
  const Problem problem = make_problem(1, 500, 0, 0.5, 10);
  // None, one, some, and more than there are.
  for (const int64_t k : {-1, 0, 1, 100, 1000}) {
    simt::Buffer<int64_t> count(std::vector<int64_t>{k});
    expect_equal<float>(problem, {TopRule::kTopK, 0.0, count.data()});
  }
}

TEST(GlobalTopMask, KeysInMemory) {
  // The key 1 has the same high digits as kIneligibleKey.
  std::mt19937 random(13);
  std::vector<uint32_t> values(2500);
  for (uint32_t& value : values) value = random() % 3 == 0 ? random() % 3 : uint32_t(random());
  simt::Buffer<uint32_t> keys(values);
  std::vector<uint32_t> descending = values;
  std::sort(descending.rbegin(), descending.rend());
  const int64_t eligible = values.size() - std::count(values.begin(), values.end(), 0u);
  for (const int64_t k : {int64_t{0}, int64_t{1}, int64_t{700}, eligible - 1, int64_t{5000}}) {
    simt::Buffer<int64_t> count(std::vector<int64_t>{k});
    const int64_t kept = std::min(k, eligible);
    const uint32_t cut = kept > 0 ? descending[kept - 1] : ~0u;
    int64_t ties =
        kept - std::count_if(values.begin(), values.end(), [&](uint32_t v) { return v > cut; });
    for (const Algorithm algorithm : {Algorithm::kRadixTiles, Algorithm::kRadixSegments}) {
      simt::Buffer<uint8_t> mask(values.size());
      run_radix(GivenKeys<uint32_t>{keys.data()}, nullptr, nullptr, 1, values.size(),
                {TopRule::kTopK, 0.0, count.data()}, algorithm, mask.data());
      int64_t ties_left = ties;
      for (size_t i = 0; i < values.size(); ++i) {
        const bool expected =
            kept > 0 && (values[i] > cut || (values[i] == cut && ties_left-- > 0));
        EXPECT_EQ(mask[i], expected) << i << ", k " << k;
      }
    }
  }
}

TEST(GlobalTopMask, Ratios) {
  const Problem problem = make_problem(1, 333, 0, 0.8, 11);
  for (const double ratio : {1e-9, 0.01, 1.0 / 3, 0.5, 0.999, 1.0}) {
    for (const TopRule rule : kRules) expect_equal<float>(problem, {rule, ratio, nullptr});
  }
}

// ---- Values that several processes hold ----

// The selection over several processes, whose messages are sums here.
template <class Element>
std::vector<uint8_t> run_processes(const Problem& problem, const SelectionRule& rule,
                                   const std::vector<int64_t>& sizes) {
  using Keys = EntropyKeys<Element>;
  using Key = typename Keys::Key;
  using Value = typename KeyTraits<Key>::Value;
  const int threads = 64, processes = sizes.size();
  std::deque<simt::Buffer<Element>> values;  // a buffer stays where it is
  std::deque<simt::Buffer<bool>> masks;
  std::vector<Keys> keys;
  std::vector<TileLayout> layouts;
  size_t begin = 0;
  for (const int64_t size : sizes) {
    values.emplace_back(size);
    masks.emplace_back(size);
    for (int64_t i = 0; i < size; ++i, ++begin) {
      values.back()[i] = element<Element>(problem.entropy[begin]);
      masks.back()[i] = problem.mask[begin];
    }
    keys.push_back({values.back().data(), masks.back().data()});
    layouts.emplace_back(1, size, 1024);
  }

  simt::Buffer<int64_t> key(1), k(1), found(1), k_left(1), ties(processes);
  simt::Buffer<double> weight(1);
  constexpr int kPasses = Digit<Key>::kPasses;
  for (int pass = 0; pass < kPasses; ++pass) {
    const int unknown = Digit<Key>::kKeyBits - kDigitBits * pass;
    const int digits = 1 << std::min(unknown, kDigitBits);
    int64_t* prefix = pass > 0 ? key.data() : nullptr;
    simt::Buffer<int64_t> counts(std::vector<int64_t>(digits, 0));
    std::vector<std::vector<int64_t>> own_counts;
    for (int p = 0; p < processes; ++p) {
      simt::Buffer<unsigned long long> own(std::vector<unsigned long long>(digits, 0));
      simt::launch(layouts[p].tiles(), threads, radix_counts_kernel<Keys>, keys[p], layouts[p],
                   pass, prefix, own.data());
      own_counts.emplace_back(own.begin(), own.end());
      for (int digit = 0; digit < digits; ++digit) counts[digit] += own_counts[p][digit];
    }
    if (pass == 0) {
      const int64_t n = std::accumulate(counts.begin(), counts.end(), int64_t{0});
      k[0] = n > 0 ? top_count(n, rule.ratio) : 0;
      if (n > 0 && rule.rule == TopRule::kQuantile) {
        const QuantilePosition position = quantile_position(n, rule.ratio);
        k[0] = n - position.lower;
        weight[0] = position.weight;
      }
    }
    simt::launch(1, threads, radix_key_kernel<int64_t>, counts.data(), digits,
                 Digit<Key>(pass).shift, prefix, k.data(), found.data(), k_left.data());
    key[0] = found[0];
    k[0] = k_left[0];
    for (int p = 0; p < processes; ++p) ties[p] = own_counts[p][key[0] & (digits - 1)];
  }

  simt::Buffer<signed_key_t<Key>> next(1), own_next(1);
  next[0] = signed_key(kNaNKey<Key>);
  for (int p = 0; p < processes; ++p) {
    simt::launch(1, 1, set_kernel<signed_key_t<Key>>, signed_key(kNaNKey<Key>), own_next.data());
    simt::launch(layouts[p].tiles(), threads, radix_next_key_kernel<Keys>, keys[p], layouts[p],
                 key.data(), own_next.data());
    next[0] = std::min(next[0], own_next[0]);
  }

  std::vector<uint8_t> result;
  std::vector<Value> lowests;
  for (int p = 0; p < processes; ++p) {
    const bool top_k = rule.rule == TopRule::kTopK, quantile = rule.rule == TopRule::kQuantile;
    const FoundOnDevice all{key.data(),
                            k.data(),
                            top_k ? ties.data() : nullptr,
                            p,
                            quantile ? next.data() : nullptr,
                            quantile ? weight.data() : nullptr};
    const int64_t tiles = layouts[p].tiles();
    simt::Buffer<RadixCut<Key>> cuts(kPasses);
    simt::Buffer<uint32_t> turns(1), tile_ties(tiles);
    const RadixState<Key> state{nullptr, cuts.data(), nullptr, turns.data(), tile_ties.data(), 1};
    simt::Buffer<Value> lowest(1);
    simt::launch(1, kWarpSize, radix_process_cut_kernel<Key>, all, state, tiles, lowest.data());
    lowests.push_back(lowest[0]);
    const RadixInputs<Keys> in{
        keys[p], nullptr, nullptr, layouts[p], {TopRule::kTopK, 0.0, nullptr}};
    simt::Buffer<uint8_t> mask(sizes[p]);
    simt::launch(tiles, threads, radix_mask_kernel<Keys>, in, state, mask.data());
    result.insert(result.end(), mask.begin(), mask.end());
  }

  Value expected = 0;
  for (size_t i = 0; i < result.size(); ++i) {
    if (!result[i]) continue;
    const Value value = load_value(element<Element>(problem.entropy[i]));
    const Value number = std::isnan(value) ? kInfinity : value;
    const bool is_first = std::count(result.begin(), result.begin() + i, 1) == 0;
    expected = is_first ? number : std::min(expected, number);
  }
  for (const Value lowest : lowests) EXPECT_EQ(lowest, expected);
  return result;
}

template <class Element>
void expect_equal_over_processes(const Problem& problem, const std::vector<int64_t>& sizes) {
  Problem rounded = problem;
  for (double& value : rounded.entropy) value = load_value(element<Element>(value));
  for (const TopRule rule : kRules) {
    for (const double ratio : {0.05, 0.2, 1.0}) {
      const SelectionRule selection{rule, ratio, nullptr};
      EXPECT_EQ(run_processes<Element>(problem, selection, sizes),
                expected_mask(rounded, selection, !std::is_same_v<Element, double>))
          << "rule " << static_cast<int>(rule) << ", ratio " << ratio;
    }
  }
}

TYPED_TEST(GlobalTopMaskTest, ProcessesOfSeveralTiles) {
  // A process of several tiles, one of a single token, and one that begins at an odd index.
  expect_equal_over_processes<TypeParam>(make_problem(1, 4000, 0, 0.7, 14), {2500, 1, 1499});
}

TEST(GlobalTopMask, ProcessesWithDistinctValues) {
  Problem problem = make_problem(1, 900, 0, 0.8, 15);
  std::iota(problem.entropy.begin(), problem.entropy.end(), -450.0);
  std::shuffle(problem.entropy.begin(), problem.entropy.end(), std::mt19937(15));
  expect_equal_over_processes<float>(problem, {300, 300, 300});
  expect_equal_over_processes<double>(problem, {899, 1});
}

TEST(GlobalTopMask, ProcessesWithEqualValues) {
  Problem problem = make_problem(1, 3000, 0, 1.0, 16);
  std::fill(problem.entropy.begin(), problem.entropy.end(), 1.5);
  // The last tie kept is within the first process, at its end, and in the second.
  for (const int64_t first : {2000, 600, 100}) {
    expect_equal_over_processes<float>(problem, {first, 3000 - first});
  }
}

TEST(GlobalTopMask, ProcessWithoutTheDecidingKeyKeepsItsLargerOnes) {
  // The first process holds more of the third largest value, 1, than are kept; the second has none.
  const Problem problem{1, 5, {2, 1, 1, 3, 0}, std::vector<bool>(5, true), {}};
  const SelectionRule rule{TopRule::kTopK, 0.6, nullptr};
  EXPECT_EQ(run_processes<float>(problem, rule, {3, 2}), (std::vector<uint8_t>{1, 1, 0, 1, 0}));
}

TEST(GlobalTopMask, ManySmallProcesses) {
  // Every process but the first few lacks some of the 100 values, and any of these may decide.
  const Problem problem = make_problem(1, 500, 0, 0.9, 18);
  for (const double ratio : {0.1, 0.3, 0.5, 0.7, 0.9}) {
    const SelectionRule rule{TopRule::kTopK, ratio, nullptr};
    const std::vector<int64_t> sizes = {200, 150, 60, 40, 20, 10, 7, 5, 4, 3, 1};
    EXPECT_EQ(run_processes<float>(problem, rule, sizes), expected_mask(problem, rule, true));
    EXPECT_EQ(run_processes<BFloat16>(problem, rule, sizes), expected_mask(problem, rule, true));
  }
}

TEST(GlobalTopMask, ProcessesWithNothingEligible) {
  expect_equal_over_processes<float>(make_problem(1, 50, 0, 0.0, 17), {20, 30});
}

TEST(GlobalTopMask, CountsOfProcessesBeyond32Bits) {
  const int64_t many = int64_t{1} << 33;
  simt::Buffer<int64_t> counts(std::vector<int64_t>{many, 0, many, 5}), k(1), key(1), k_left(1);
  const std::vector<std::pair<int64_t, std::pair<int64_t, int64_t>>> cases = {
      {5, {3, 5}},           {6, {2, 1}},  {many + 5, {2, many}}, {many + 6, {0, 1}},
      {3 * many, {0, many}}, {0, {-1, 0}}, {-7, {-1, 0}}};
  for (const auto& [sought, expected] : cases) {
    k[0] = sought;
    simt::launch(1, 64, radix_key_kernel<int64_t>, counts.data(), 4, 0, nullptr, k.data(),
                 key.data(), k_left.data());
    EXPECT_EQ(key[0], expected.first) << sought;
    EXPECT_EQ(k_left[0], expected.second) << sought;
  }
}

}  // namespace
}  // namespace entropy_rl
