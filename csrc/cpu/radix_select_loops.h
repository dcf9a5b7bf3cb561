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
  typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes)));
  int count = 0;
  int i = 0;
  while (i + kVectorBytes <= n) {
    // A byte counts to 255.
    const int end = std::min(n - kVectorBytes + 1, i + 255 * kVectorBytes);
    Bytes counts = {};
    for (; i < end; i += kVectorBytes) {
      Bytes bytes;
      memcpy(&bytes, mask + i, sizeof(bytes));
      counts -= reinterpret_cast<Bytes>(bytes != 0);  // a true comparison is -1
    }
    for (int j = 0; j < kVectorBytes; ++j) count += counts[j];
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
  if constexpr (kVectorBytes == 64 && sizeof(Key) == 4) {
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
  } else if constexpr (kVectorBytes == 32 && sizeof(Key) == 4) {
    // Comparisons are signed, so all sides have their highest bit flipped.
    const __m256i flip = _mm256_set1_epi32(INT32_MIN);
    const __m256i lowest = _mm256_xor_si256(_mm256_set1_epi32(static_cast<int>(low)), flip);
    const __m256i highest = _mm256_xor_si256(_mm256_set1_epi32(static_cast<int>(high)), flip);
    __m256i place = _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(first)),
                                     _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    for (; i + 32 <= count; i += 32) {
      __m256i is_above[4];
      for (int q = 0; q < 4; ++q) {
        const __m256i key = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + i + 8 * q));
        const __m256i flipped = _mm256_xor_si256(key, flip);
        is_above[q] = _mm256_cmpgt_epi32(flipped, highest);
        const __m256i outside = _mm256_or_si256(is_above[q], _mm256_cmpgt_epi32(lowest, flipped));
        const int inside_set = ~_mm256_movemask_ps(_mm256_castsi256_ps(outside)) & 0xff;
        const uint64_t packed = kPackOrders.of[inside_set];
        const __m256i order = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(packed));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(inside + found),
                            _mm256_permutevar8x32_epi32(key, order));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(places + found),
                            _mm256_permutevar8x32_epi32(place, order));
        found += static_cast<int>(packed >> 59);
        place = _mm256_add_epi32(place, _mm256_set1_epi32(8));
      }
      // The packs work within halves of 16 bytes; the permutation undoes that.
      const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(is_above[0], is_above[1]),
                                               _mm256_packs_epi32(is_above[2], is_above[3]));
      const __m256i ordered =
          _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(above + i),
                          _mm256_and_si256(ordered, _mm256_set1_epi8(1)));
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
