// global_top_mask by radix select (global_top_mask.cuh has the rule): a histogram of the keys that
// share the bits found so far gives 11 more bits of the k-th largest key.
// Segments of few keys, and where segments are groups of rows first segment_rows_kernel:
//   radix_segment_kernel    a block a segment does all of it, with histograms in shared memory
// The others:
//   radix_histogram_kernel  a block a tile: one pass, added to the counts of the segment; each
//                           block finds the previous pass's digit for itself
//   radix_mask_kernel       a block a tile; where only some ties are kept, it waits for the counts
//                           of ties in the tiles before
// For keys of several processes, radix_counts_kernel and radix_key_kernel are a pass, and between
// them the processes add up their counts. Bytes for a float32 token: 5 in each of 3 passes (6 for
// double), 5 to count ties if only some are kept, 6 for the mask. Keys are computed as they are
// read. Counts are integers, so any order gives the same bits.
#pragma once

#include "global_top_mask.cuh"
#include "packs.cuh"

namespace entropy_rl {

// ---- Keys ----

// Keys of entropies. Elements outside the mask have kIneligibleKey.
template <class Element>
struct EntropyKeys {
  using Key = selection_key_t<accumulate_t<Element>>;
  const Element* entropy;  // [rows, columns]
  const bool* mask;        // [rows, columns]

  __device__ __forceinline__ bool aligned(int64_t index) const {
    return TokenPack<Element>::is_aligned(entropy + index) &&
           TokenPack<bool>::is_aligned(mask + index);
  }
  __device__ __forceinline__ TokenPack<Key> load(int64_t index) const {
    const TokenPack<Element> values = TokenPack<Element>::load_at_once(entropy + index);
    const TokenPack<bool> eligible = TokenPack<bool>::load(mask + index);
    TokenPack<Key> keys;
#pragma unroll
    for (int j = 0; j < kPackTokens; ++j) {
      keys.values[j] =
          eligible.values[j] ? selection_key(load_value(values.values[j])) : kIneligibleKey<Key>;
    }
    return keys;
  }
  __device__ __forceinline__ Key operator[](int64_t index) const {
    return mask[index] ? selection_key(load_value(entropy[index])) : kIneligibleKey<Key>;
  }
};

// Keys that are in memory.
template <class K>
struct GivenKeys {
  using Key = K;
  const Key* keys;  // [rows, columns]

  __device__ __forceinline__ bool aligned(int64_t index) const {
    return TokenPack<Key>::is_aligned(keys + index);
  }
  __device__ __forceinline__ TokenPack<Key> load(int64_t index) const {
    return TokenPack<Key>::load(keys + index);
  }
  __device__ __forceinline__ Key operator[](int64_t index) const { return keys[index]; }
};

// Calls f(i, keys of begin + i and the next three) for this thread's share of [begin, begin +
// size); keys beyond the end are kIneligibleKey. All threads of the block make the same number of
// calls, so that f may contain barriers.
template <class Keys, class F>
__device__ __forceinline__ void for_each_pack(const Keys& keys, int64_t begin, int64_t size, F f) {
  using Key = typename Keys::Key;
  const bool aligned = keys.aligned(begin);
  for (int64_t round = 0; round < size; round += kPackTokens * blockDim.x) {
    const int64_t i = round + kPackTokens * threadIdx.x;
    TokenPack<Key> pack;
    if (aligned && i + kPackTokens <= size) {
      pack = keys.load(begin + i);
    } else {
#pragma unroll
      for (int j = 0; j < kPackTokens; ++j) {
        pack.values[j] = i + j < size ? keys[begin + i + j] : kIneligibleKey<Key>;
      }
    }
    f(i, pack.values);
  }
}

// ---- Digits ----

// The digit that a pass finds: bits [shift, shift + bits) of a key.
template <class Key>
struct Digit {
  static constexpr int kKeyBits = 8 * static_cast<int>(sizeof(Key));
  static constexpr int kPasses = (kKeyBits + kDigitBits - 1) / kDigitBits;
  int bits;
  int shift;

  __device__ __forceinline__ explicit Digit(int pass) {
    const int unknown = kKeyBits - kDigitBits * pass;
    bits = unknown < kDigitBits ? unknown : kDigitBits;
    shift = unknown - bits;
  }
  __device__ __forceinline__ int of(Key key) const {
    return static_cast<int>(key >> shift & ((Key{1} << bits) - 1));
  }
  // The largest key that has the digits that earlier passes found.
  __device__ __forceinline__ Key last_candidate(Key prefix) const {
    return prefix | (((Key{1} << bits) - 1) << shift);
  }
  // Whether a key has the digits that earlier passes found.
  __device__ __forceinline__ bool is_candidate(Key key, Key prefix) const {
    return shift + bits == kKeyBits || (key ^ prefix) >> (shift + bits) == 0;
  }
};

// What the passes have found of a segment's k-th largest key.
template <class Key, class Count = uint32_t>
struct RadixCut {
  Key prefix;    // the digits found; after the last pass the k-th largest key
  Key eligible;  // keys in the segment; a Key, so that the struct has no padding
  Count rank;    // of the keys that share the prefix, the k-th largest is the rank-th
  Count equal;   // how many keys share the prefix; 0: the segment keeps nothing

  __device__ __forceinline__ bool keeps_nothing() const { return equal == 0; }
  __device__ __forceinline__ bool keeps_all_ties() const { return rank == equal; }
};

// The rank, counted from the largest of n keys, of the key at which the rule cuts; 0: nothing is
// kept.
template <class Count>
__device__ __forceinline__ Count deciding_rank(Count n, const SelectionRule& rule) {
  if (n == 0) return 0;
  if (rule.rule == TopRule::kQuantile) {
    return n - static_cast<Count>(quantile_position(n, rule.ratio).lower);
  }
  if (!rule.count) return static_cast<Count>(top_count(n, rule.ratio));
  const int64_t count = *rule.count;
  return count < 0 ? 0 : count < static_cast<int64_t>(n) ? static_cast<Count>(count) : n;
}

template <class Key, class Count = uint32_t>
struct RadixShared {
  Count counts[kMaxWarps];
  Key keys[kMaxWarps];
  RadixCut<Key, Count> cut;
};

// Adds to `cut` the digit at `shift`, from the histogram of the keys that share its prefix. In the
// first pass (`is_first`) the rule gives the rank. All threads of the block call it; all return the
// result. `whole_packs` says that the histogram is whole packs, which may be loaded as such.
template <class Key, class Count>
__device__ __forceinline__ RadixCut<Key, Count> with_digit(const Count* histogram /*[digits]*/,
                                                           bool whole_packs, int digits,
                                                           const RadixCut<Key, Count>& cut,
                                                           bool is_first, int shift,
                                                           const SelectionRule& rule,
                                                           RadixShared<Key, Count>* shared) {
  // Thread t takes the t-th run of packs from the highest down.
  const int threads = static_cast<int>(blockDim.x);
  const int packs = (digits + kPackTokens - 1) / kPackTokens;
  const int run = (packs + threads - 1) / threads;
  const int highest = packs - 1 - static_cast<int>(threadIdx.x) * run;
  const auto pack_at = [&](int pack) {
    const int first = pack * kPackTokens;
    if (whole_packs) return TokenPack<Count>::load(histogram + first);
    TokenPack<Count> counts;
#pragma unroll
    for (int j = 0; j < kPackTokens; ++j) {
      counts.values[j] = first + j < digits ? histogram[first + j] : Count{0};
    }
    return counts;
  };
  Count own = 0;
  // Unrolled, this loop and the next would take registers that the whole kernel then lacks.
#pragma unroll 1
  for (int i = 0; i < run && i <= highest; ++i) {
    const TokenPack<Count> pack = pack_at(highest - i);
#pragma unroll
    for (int j = 0; j < kPackTokens; ++j) own += pack.values[j];
  }
  Count total;
  Count above = block_exclusive_scan(own, &total, shared->counts);
  const Key eligible = is_first ? static_cast<Key>(total) : cut.eligible;
  const Count rank = is_first ? deciding_rank(total, rule) : cut.rank;
  if (rank == 0) {
    if (threadIdx.x == 0) shared->cut = {kNaNKey<Key>, eligible, 0, 0};
  } else if (above < rank && rank <= above + own) {
    bool found = false;
#pragma unroll 1
    for (int i = 0; !found; ++i) {
      const TokenPack<Count> pack = pack_at(highest - i);
#pragma unroll
      for (int j = kPackTokens - 1; j >= 0; --j) {
        const Count equal = pack.values[j];
        if (!found && rank <= above + equal) {
          found = true;
          const Key digit = static_cast<Key>((highest - i) * kPackTokens + j);
          shared->cut = {cut.prefix | digit << shift, eligible, rank - above, equal};
        }
        above += equal;
      }
    }
  }
  __syncthreads();
  return shared->cut;
}

// Counts the eligible keys of one tile that share the prefix.
template <class Keys>
__device__ __forceinline__ void count_digits(const Keys& keys, int64_t begin, int64_t size,
                                             int pass, typename Keys::Key prefix,
                                             uint32_t* histogram /*[kDigits], shared*/) {
  using Key = typename Keys::Key;
  const Digit<Key> digit(pass);
  for_each_pack(keys, begin, size, [&](int64_t, const Key(&pack)[kPackTokens]) {
#pragma unroll
    for (int j = 0; j < kPackTokens; ++j) {
      if (pack[j] != kIneligibleKey<Key> && digit.is_candidate(pack[j], prefix)) {
        atomicAdd(&histogram[digit.of(pack[j])], 1u);
      }
    }
  });
}

__device__ __forceinline__ void clear_digits(uint32_t* histogram /*[kDigits]*/) {
  for (int digit = threadIdx.x; digit < kDigits; digit += blockDim.x) histogram[digit] = 0;
}

// Adds a block's histogram to one that other blocks add to as well.
template <class Count>
__device__ __forceinline__ void add_digits(const uint32_t* histogram /*[kDigits], shared*/,
                                           Count* sums /*[digits]*/) {
  for (int digit = threadIdx.x; digit < kDigits; digit += blockDim.x) {
    if (histogram[digit] != 0) atomicAdd(&sums[digit], Count{histogram[digit]});
  }
}

// ---- From the last cut to the mask ----

// The smallest key of a tile that is larger than `key`.
template <class Keys>
__device__ __forceinline__ typename Keys::Key smallest_above(const Keys& keys, int64_t begin,
                                                             int64_t size, typename Keys::Key key) {
  using Key = typename Keys::Key;
  Key smallest = kNaNKey<Key>;
  for_each_pack(keys, begin, size, [&](int64_t, const Key(&pack)[kPackTokens]) {
#pragma unroll
    for (int j = 0; j < kPackTokens; ++j) {
      if (pack[j] > key && pack[j] < smallest) smallest = pack[j];
    }
  });
  return smallest;
}

// Whether the quantile lies between the cut and the next larger key.
template <class Key>
__device__ __forceinline__ bool needs_next_key(const RadixCut<Key>& cut,
                                               const SelectionRule& rule) {
  return rule.rule == TopRule::kQuantile && cut.rank == 1 &&
         quantile_position(static_cast<int64_t>(cut.eligible), rule.ratio).weight > 0.0;
}
// Whether only some of the keys equal to the cut are kept.
template <class Key>
__device__ __forceinline__ bool splits_ties(const RadixCut<Key>& cut, const SelectionRule& rule) {
  return rule.rule == TopRule::kTopK && !cut.keeps_all_ties();
}

// The smallest key that is kept if no ties are split. `next` is used if needs_next_key.
template <class Key>
__device__ __forceinline__ Key smallest_kept(const RadixCut<Key>& cut, Key next,
                                             const SelectionRule& rule) {
  if (!needs_next_key(cut, rule)) return cut.prefix;
  return quantile_key(cut.prefix, next,
                      quantile_position(static_cast<int64_t>(cut.eligible), rule.ratio).weight);
}

__device__ __forceinline__ void fill_zero_bytes(uint8_t* out /*[size]*/, int64_t size) {
  for (int64_t i = threadIdx.x; i < size; i += blockDim.x) out[i] = 0;
}

// Keeps a tile's keys from `key` up.
template <class Keys>
__device__ __forceinline__ void mask_from(const Keys& keys, int64_t begin, int64_t size,
                                          typename Keys::Key key, uint8_t* out /*[size]*/) {
  using Key = typename Keys::Key;
  for_each_pack(keys, begin, size, [&](int64_t i, const Key(&pack)[kPackTokens]) {
    TokenPack<uint8_t> kept;
#pragma unroll
    for (int j = 0; j < kPackTokens; ++j) kept.values[j] = pack[j] >= key;
    store_tokens(kept, size - i, out + i);
  });
}

// Keeps a tile's keys above `key` and the first `ties` that equal it; returns how many equal it.
template <class Keys>
__device__ __forceinline__ uint32_t mask_first_ties(const Keys& keys, int64_t begin, int64_t size,
                                                    typename Keys::Key key, uint32_t ties,
                                                    uint32_t* shared_counts /*[kMaxWarps]*/,
                                                    uint8_t* out /*[size]*/) {
  using Key = typename Keys::Key;
  uint32_t before_round = 0;
  for_each_pack(keys, begin, size, [&](int64_t i, const Key(&pack)[kPackTokens]) {
    uint32_t own = 0;
#pragma unroll
    for (int j = 0; j < kPackTokens; ++j) own += pack[j] == key;
    uint32_t total;
    uint32_t rank = before_round + block_exclusive_scan(own, &total, shared_counts);
    TokenPack<uint8_t> kept;
#pragma unroll
    for (int j = 0; j < kPackTokens; ++j) {
      const bool tie = pack[j] == key;
      kept.values[j] = pack[j] > key || (tie && rank < ties);
      rank += tie;
    }
    store_tokens(kept, size - i, out + i);
    before_round += total;
  });
  return before_round;
}

// Rows [begin, end) that are a segment.
struct alignas(16) SegmentRows {
  int64_t begin;
  int64_t end;
};

// The segment of each row. `ids` ascend; a segment is a run of equal ones.
template <class Id>
__global__ void segment_rows_kernel(const Id* ids /*[rows]*/, int64_t rows,
                                    SegmentRows* segments /*[rows]*/) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  int64_t begin = 0;
  int64_t end = row;
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (ids[middle] < ids[row]) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  segments[row] = {begin, segment_end(ids, row, rows)};
}

// The inputs of the kernels. Rows are taken in `row_order`. Without `segments` every row is one,
// and all go to the same kernels.
template <class Keys>
struct RadixInputs {
  Keys keys;                    // [rows, columns]
  const SegmentRows* segments;  // [rows], or null
  const int64_t* row_order;     // [rows], or null: 0, 1, 2, ...
  TileLayout layout;
  SelectionRule rule;
  int64_t block_keys = 0;  // most keys of a segment that radix_segment_kernel takes

  // Where a tile begins among the keys and in the mask.
  __device__ __forceinline__ int64_t begin(int64_t tile) const {
    const int64_t row = layout.row(tile);
    return (row_order ? row_order[row] : row) * layout.columns + layout.column(tile);
  }
  __device__ __forceinline__ SegmentRows segment(int64_t row) const {
    return segments ? segments[row] : SegmentRows{row, row + 1};
  }
  __device__ __forceinline__ bool is_small(const SegmentRows& rows) const {
    return (rows.end - rows.begin) * layout.columns <= block_keys;
  }

  // The place in RadixState of a segment that is not small. Two such segments begin over block_keys
  // keys apart, so that far fewer places than rows are enough.
  __device__ __forceinline__ int64_t place(const SegmentRows& rows) const {
    return segments ? rows.begin * layout.columns / keys_a_place() : rows.begin;
  }
  ENTROPY_RL_HD int64_t places() const {
    return segments ? layout.rows * layout.columns / keys_a_place() : layout.rows;
  }

 private:
  ENTROPY_RL_HD int64_t keys_a_place() const {
    return layout.columns > block_keys ? layout.columns : block_keys;
  }
};

// ---- A block a segment ----

template <class Keys>
__global__ void radix_segment_kernel(RadixInputs<Keys> in, uint8_t* mask /*[rows, columns]*/) {
  using Key = typename Keys::Key;
  __shared__ __align__(16) uint32_t histogram[kDigits];
  __shared__ RadixShared<Key> shared;
  const TileLayout& layout = in.layout;
  for (int64_t row = blockIdx.x; row < layout.rows; row += gridDim.x) {
    const SegmentRows segment = in.segment(row);
    if (segment.begin != row) continue;  // another block's segment
    if (in.segments && !in.is_small(segment)) continue;
    const int64_t first = row * layout.tiles_per_row;
    const int64_t last = segment.end * layout.tiles_per_row;
    RadixCut<Key> cut{};
    for (int pass = 0; pass < Digit<Key>::kPasses; ++pass) {
      clear_digits(histogram);
      __syncthreads();
      for (int64_t tile = first; tile < last; ++tile) {
        count_digits(in.keys, in.begin(tile), layout.size(tile), pass, cut.prefix, histogram);
      }
      __syncthreads();
      cut = with_digit(histogram, true, kDigits, cut, pass == 0, Digit<Key>(pass).shift, in.rule,
                       &shared);
    }
    if (splits_ties(cut, in.rule)) {
      uint32_t ties = cut.rank;
      for (int64_t tile = first; tile < last; ++tile) {
        const int64_t begin = in.begin(tile);
        const uint32_t found = mask_first_ties(in.keys, begin, layout.size(tile), cut.prefix, ties,
                                               shared.counts, mask + begin);
        ties = ties > found ? ties - found : 0;
      }
      continue;
    }
    Key next = kNaNKey<Key>;
    if (needs_next_key(cut, in.rule)) {
      for (int64_t tile = first; tile < last; ++tile) {
        next = SmallerKey{}(next,
                            smallest_above(in.keys, in.begin(tile), layout.size(tile), cut.prefix));
      }
      next = block_reduce(next, kNaNKey<Key>, SmallerKey{}, shared.keys);
    }
    const Key smallest = smallest_kept(cut, next, in.rule);
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t begin = in.begin(tile);
      if (cut.keeps_nothing()) {
        fill_zero_bytes(mask + begin, layout.size(tile));
      } else {
        mask_from(in.keys, begin, layout.size(tile), smallest, mask + begin);
      }
    }
  }
}

// ---- A block a tile ----

// What the kernels pass on, for every segment at its place.
template <class Key>
struct RadixState {
  uint32_t* histograms;  // [passes, places, kDigits], zero at the start; null if the cuts are given
  RadixCut<Key>* cuts;   // [passes, places]
  Key* next_keys;        // [tiles]: the tile's smallest key above the last pass's candidates
  uint32_t* turns;       // [places], zero at the start: tiles whose mask has begun
  uint32_t* tile_ties;   // [tiles], zero at the start: one more than the tile's ties, once counted
  int64_t places;

  __device__ __forceinline__ uint32_t* histogram(int pass, int64_t place) const {
    return histograms + (pass * places + place) * kDigits;
  }
  __device__ __forceinline__ RadixCut<Key>* cut(int pass, int64_t place) const {
    return cuts + pass * places + place;
  }
};

// A segment's cut after `pass`, from its complete histogram; stored for the next kernel.
template <class Keys>
__device__ __forceinline__ RadixCut<typename Keys::Key> cut_after(
    const RadixInputs<Keys>& in, const RadixState<typename Keys::Key>& state, int pass,
    const SegmentRows& segment, int64_t tile, RadixShared<typename Keys::Key>* shared) {
  using Key = typename Keys::Key;
  const int64_t place = in.place(segment);
  const RadixCut<Key> before = pass > 0 ? *state.cut(pass - 1, place) : RadixCut<Key>{};
  const RadixCut<Key> cut = with_digit(state.histogram(pass, place), true, kDigits, before,
                                       pass == 0, Digit<Key>(pass).shift, in.rule, shared);
  if (tile == segment.begin * in.layout.tiles_per_row && threadIdx.x == 0) {
    *state.cut(pass, place) = cut;
  }
  return cut;
}

template <class Keys>
__global__ void radix_histogram_kernel(RadixInputs<Keys> in, RadixState<typename Keys::Key> state,
                                       int pass) {
  using Key = typename Keys::Key;
  __shared__ uint32_t histogram[kDigits];
  __shared__ RadixShared<Key> shared;
  const int64_t tile = blockIdx.x;
  const SegmentRows segment = in.segment(in.layout.row(tile));
  if (in.segments && in.is_small(segment)) return;
  RadixCut<Key> cut{};
  if (pass > 0) cut = cut_after(in, state, pass - 1, segment, tile, &shared);
  clear_digits(histogram);
  __syncthreads();
  const int64_t begin = in.begin(tile);
  const int64_t size = in.layout.size(tile);
  count_digits(in.keys, begin, size, pass, cut.prefix, histogram);
  __syncthreads();
  add_digits(histogram, state.histogram(pass, in.place(segment)));
  if (in.rule.rule == TopRule::kQuantile && pass == Digit<Key>::kPasses - 1) {
    const Key above = Digit<Key>(pass).last_candidate(cut.prefix);
    const Key next = block_reduce(smallest_above(in.keys, begin, size, above), kNaNKey<Key>,
                                  SmallerKey{}, shared.keys);
    if (threadIdx.x == 0) state.next_keys[tile] = next;
  }
}

// The smallest key of a segment above its cut `key`: a candidate of the last pass or, above them,
// the smallest of the tiles' next_keys. All threads of the block call it; all return it.
template <class Keys>
__device__ __forceinline__ typename Keys::Key next_key(const RadixInputs<Keys>& in,
                                                       const RadixState<typename Keys::Key>& state,
                                                       const SegmentRows& segment,
                                                       typename Keys::Key key,
                                                       RadixShared<typename Keys::Key>* shared) {
  using Key = typename Keys::Key;
  constexpr int kLast = Digit<Key>::kPasses - 1;
  const Digit<Key> digit(kLast);  // the lowest bits
  const uint32_t* histogram = state.histogram(kLast, in.place(segment));
  Key next = kNaNKey<Key>;
  for (int d = digit.of(key) + 1 + static_cast<int>(threadIdx.x); d < 1 << digit.bits;
       d += static_cast<int>(blockDim.x)) {
    if (histogram[d] != 0) next = SmallerKey{}(next, key - digit.of(key) + d);
  }
  const int64_t last = segment.end * in.layout.tiles_per_row;
  for (int64_t i = segment.begin * in.layout.tiles_per_row + threadIdx.x; i < last;
       i += blockDim.x) {
    next = SmallerKey{}(next, state.next_keys[i]);
  }
  return block_reduce(next, kNaNKey<Key>, SmallerKey{}, shared->keys);
}

// Writes the mask of a tile of a segment of which only the first cut.rank ties are kept. A block
// waits for the ties of the tiles before its own, so tiles are taken in turn: the blocks that have
// those are running or done, whatever order blocks are started in.
template <class Keys>
__device__ __forceinline__ void mask_in_turn(const RadixInputs<Keys>& in,
                                             const RadixState<typename Keys::Key>& state,
                                             const SegmentRows& segment,
                                             const RadixCut<typename Keys::Key>& cut,
                                             RadixShared<typename Keys::Key>* shared,
                                             uint8_t* mask /*[rows, columns]*/) {
  using Key = typename Keys::Key;
  const int64_t first = segment.begin * in.layout.tiles_per_row;
  if (threadIdx.x == 0) shared->counts[0] = atomicAdd(&state.turns[in.place(segment)], 1u);
  __syncthreads();
  const int64_t tile = first + shared->counts[0];
  const int64_t begin = in.begin(tile);
  const int64_t size = in.layout.size(tile);
  uint32_t own = 0;
  for_each_pack(in.keys, begin, size, [&](int64_t, const Key(&pack)[kPackTokens]) {
#pragma unroll
    for (int j = 0; j < kPackTokens; ++j) own += pack[j] == cut.prefix;
  });
  own = block_reduce(own, 0u, Plus{}, shared->counts);
  // The number is all that other blocks read of this one, so no fence is needed.
  if (threadIdx.x == 0) atomicAdd(&state.tile_ties[tile], own + 1);
  uint32_t before = 0;
  for (int64_t i = first + threadIdx.x; i < tile; i += blockDim.x) {
    uint32_t ties = 0;
    while (ties == 0) ties = atomicAdd(&state.tile_ties[i], 0u);
    before += ties - 1;
  }
  before = block_reduce(before, 0u, Plus{}, shared->counts);
  const uint32_t ties = before < cut.rank ? cut.rank - before : 0;
  mask_first_ties(in.keys, begin, size, cut.prefix, ties, shared->counts, mask + begin);
}

template <class Keys>
__global__ void radix_mask_kernel(RadixInputs<Keys> in, RadixState<typename Keys::Key> state,
                                  uint8_t* mask /*[rows, columns]*/) {
  using Key = typename Keys::Key;
  __shared__ RadixShared<Key> shared;
  const int64_t tile = blockIdx.x;
  const SegmentRows segment = in.segment(in.layout.row(tile));
  if (in.segments && in.is_small(segment)) return;
  constexpr int kLast = Digit<Key>::kPasses - 1;
  const RadixCut<Key> cut = state.histograms ? cut_after(in, state, kLast, segment, tile, &shared)
                                             : *state.cut(kLast, in.place(segment));
  if (splits_ties(cut, in.rule)) return mask_in_turn(in, state, segment, cut, &shared, mask);
  const int64_t begin = in.begin(tile);
  const int64_t size = in.layout.size(tile);
  if (cut.keeps_nothing()) return fill_zero_bytes(mask + begin, size);
  Key next = kNaNKey<Key>;
  if (needs_next_key(cut, in.rule)) next = next_key(in, state, segment, cut.prefix, &shared);
  mask_from(in.keys, begin, size, smallest_kept(cut, next, in.rule), mask + begin);
}

// ---- Keys that several processes hold ----

// Counts the digits at `pass` of the keys that share the higher digits of `key`.
template <class Keys>
__global__ void radix_counts_kernel(Keys keys, TileLayout layout, int pass,
                                    const int64_t* key /*[1], or null in the first pass*/,
                                    unsigned long long* counts /*[digits], zero at the start*/) {
  using Key = typename Keys::Key;
  __shared__ uint32_t histogram[kDigits];
  const Key prefix = key ? static_cast<Key>(*key) : 0;
  clear_digits(histogram);
  __syncthreads();
  count_digits(keys, layout.begin(blockIdx.x), layout.size(blockIdx.x), pass, prefix, histogram);
  __syncthreads();
  add_digits(histogram, counts);
}

// Writes to `found` the higher digits of `key` and the digit of the k-th largest of the counted
// keys, which is the k_left-th largest of the keys with that digit. k is clamped to the number of
// keys; for k <= 0 all bits of `found` are set. One block.
template <class Count>
__global__ void radix_key_kernel(const Count* counts /*[digits]*/, int digits, int shift,
                                 const int64_t* key /*[1], or null in the first pass*/,
                                 const int64_t* k /*[1]*/, int64_t* found /*[1]*/,
                                 int64_t* k_left /*[1]*/) {
  using Cut = RadixCut<uint64_t, Count>;
  __shared__ RadixShared<uint64_t, Count> shared;
  const Cut before{key ? static_cast<uint64_t>(*key) : 0, 0, 0, 0};
  const SelectionRule rule{TopRule::kTopK, 0.0, k};
  const bool whole_packs = TokenPack<Count>::is_aligned(counts) && digits % kPackTokens == 0;
  const Cut cut = with_digit(counts, whole_packs, digits, before, true, shift, rule, &shared);
  if (threadIdx.x == 0) {
    *found = static_cast<int64_t>(cut.prefix);
    *k_left = cut.rank;
  }
}

template <class T>
__global__ void set_kernel(T value, T* to /*[1]*/) {
  *to = value;
}

// The smallest key above `key`; `next` is the largest of all at the start.
template <class Keys>
__global__ void radix_next_key_kernel(Keys keys, TileLayout layout, const int64_t* key /*[1]*/,
                                      signed_key_t<typename Keys::Key>* next /*[1]*/) {
  using Key = typename Keys::Key;
  __shared__ Key shared[kMaxWarps];
  Key smallest = smallest_above(keys, layout.begin(blockIdx.x), layout.size(blockIdx.x),
                                static_cast<Key>(*key));
  smallest = block_reduce(smallest, kNaNKey<Key>, SmallerKey{}, shared);
  if (threadIdx.x == 0) atomicMin(next, signed_key(smallest));
}

// What the processes found, in device memory; `ties` and `next` may be null.
struct FoundOnDevice {
  const int64_t* key;   // [1]
  const int64_t* k;     // [1]
  const int64_t* ties;  // [processes]
  int64_t process;
  const void* next;      // [1] signed_key_t
  const double* weight;  // [1]
};

// Writes the cut of one process's keys as the last pass of a RadixState does, and the lowest value
// that any process keeps; clears what radix_mask_kernel counts in. One block.
template <class Key>
__global__ void radix_process_cut_kernel(FoundOnDevice found, RadixState<Key> state, int64_t tiles,
                                         typename KeyTraits<Key>::Value* lowest /*[1]*/) {
  __shared__ int64_t shared[kMaxWarps];
  for (int64_t tile = threadIdx.x; tile < tiles; tile += blockDim.x) state.tile_ties[tile] = 0;
  const FoundKey key{*found.key, *found.k};
  ProcessCut<Key> cut;
  if (found.ties) {
    int64_t before = 0;
    for (int i = threadIdx.x; i < found.process; i += blockDim.x) before += found.ties[i];
    before = block_reduce(before, int64_t{0}, Plus{}, shared);
    cut = cut_ties<Key>(key, before, found.ties[found.process]);
  } else if (found.next) {
    const Key next = unsigned_key<Key>(*static_cast<const signed_key_t<Key>*>(found.next));
    cut = cut_quantile(key, next, *found.weight);
  } else {
    cut = cut_at<Key>(key);
  }
  if (threadIdx.x == 0) {
    // Only whether rank and equal differ matters, and that equal is not 0: keys above the cut are
    // kept even where none equals it.
    const uint32_t ties = cut.keeps_all_ties ? 1 : static_cast<uint32_t>(cut.ties);
    *state.cut(Digit<Key>::kPasses - 1, 0) = {cut.key, 0, ties,
                                              cut.keeps_all_ties ? ties : ties + 1};
    *state.turns = 0;
    *lowest = cut.lowest;
  }
}

}  // namespace entropy_rl
