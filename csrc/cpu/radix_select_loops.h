// The loops of radix_select.h and global_top_mask.cpp (see each_simd.h).

template <class Element>
void write_keys(const Element* entropy /*[n]*/, const uint8_t* mask /*[n]*/, int64_t n,
                selection_key_t<accumulate_t<Element>>* keys /*[n]*/) {
  using Key = selection_key_t<accumulate_t<Element>>;
  // A key is computed for every token and then selected, so that the loop has no branch. The mask
  // is read as bytes, because the loop does not vectorise over bool.
  for (int64_t i = 0; i < n; ++i) {
    const Key key = selection_key(load_value(entropy[i]));
    keys[i] = mask[i] != 0 ? key : kIneligibleKey<Key>;
  }
}

inline int count_nonzero(const uint8_t* mask, int n) {
  typedef uint8_t Bytes __attribute__((vector_size(kBytes)));
  int count = 0;
  int i = 0;
  while (i + kBytes <= n) {
    // A byte counts to 255.
    const int end = std::min(n - kBytes + 1, i + 255 * kBytes);
    Bytes counts = {};
    for (; i < end; i += kBytes) {
      Bytes bytes;
      memcpy(&bytes, mask + i, sizeof(bytes));
      counts -= reinterpret_cast<Bytes>(bytes != 0);  // a true comparison is -1
    }
    for (int j = 0; j < kBytes; ++j) count += counts[j];
  }
  for (; i < n; ++i) count += mask[i] != 0;
  return count;
}

// mask[i] = keys[i] >= key
template <class Key>
void write_at_least(const Key* keys /*[count]*/, int count, Key key, uint8_t* mask /*[count]*/) {
  for (int i = 0; i < count; ++i) mask[i] = keys[i] >= key;
}

// Sets above[i] = keys[i] > high, copies the keys in [low, high] with their positions, which begin
// at `first`, and returns how many these are. May write up to kWindowSlack more of both.
template <class Key>
int split_at_window(const Key* keys /*[count]*/, int count, Key low, Key high, uint32_t first,
                    uint8_t* above /*[count]*/, Key* inside, uint32_t* places) {
  int found = 0;
  int i = 0;
#if defined(ENTROPY_RL_X86_SIMD)
  if constexpr (kPacks && sizeof(Key) == 4) {
    const __m512i lowest = _mm512_set1_epi32(static_cast<int>(low));
    const __m512i highest = _mm512_set1_epi32(static_cast<int>(high));
    __m512i place =
        _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(first)),
                         _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    for (; i + 16 <= count; i += 16) {
      const __m512i key = _mm512_loadu_si512(keys + i);
      const __mmask16 is_above = _mm512_cmpgt_epu32_mask(key, highest);
      const __mmask16 is_inside = _mm512_mask_cmpge_epu32_mask(_knot_mask16(is_above), key, lowest);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(above + i), _mm_maskz_set1_epi8(is_above, 1));
      // To memory, the instruction is slow on some processors.
      _mm512_storeu_si512(inside + found, _mm512_maskz_compress_epi32(is_inside, key));
      _mm512_storeu_si512(places + found, _mm512_maskz_compress_epi32(is_inside, place));
      found += __builtin_popcount(is_inside);
      place = _mm512_add_epi32(place, _mm512_set1_epi32(16));
    }
  }
#endif
  uint8_t is_inside[kBlockKeys + 8];
  const int rest = count - i;
  for (int j = 0; j < rest; ++j) {
    above[i + j] = keys[i + j] > high;
    is_inside[j] = keys[i + j] - low <= high - low;
  }
  memset(is_inside + rest, 0, 8);
  for (int j = 0; j < rest; j += 8) {
    uint64_t flags;  // the lowest byte that is not 0 is that of the first key inside
    memcpy(&flags, is_inside + j, sizeof(flags));
    for (; flags != 0; flags &= flags - 1) {
      const int at = i + j + (__builtin_ctzll(flags) >> 3);
      inside[found] = keys[at];
      places[found++] = first + static_cast<uint32_t>(at);
    }
  }
  return found;
}

// Whether the bits from `shift` up of any key are `prefix`.
template <class Key>
bool any_matches(const Key* keys /*[count]*/, int count, int shift, Key prefix) {
  Key any = 0;
  for (int i = 0; i < count; ++i) any |= keys[i] >> shift == prefix;
  return any != 0;
}

// The smallest of the keys above `key`; kNaNKey if there is none.
template <class Key>
Key smallest_above(const Key* keys /*[count]*/, int count, Key key) {
  if (key == kNaNKey<Key>) return key;
  // Relative to the smallest possible key above, the differences of keys below wrap around and are
  // larger than those of all keys above.
  const Key first = key + 1;
  Key nearest = kNaNKey<Key> - first;
  for (int i = 0; i < count; ++i) {
    const Key distance = keys[i] - first;
    nearest = distance < nearest ? distance : nearest;
  }
  return first + nearest;
}
