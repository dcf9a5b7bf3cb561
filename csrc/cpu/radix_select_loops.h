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
  int count = 0;
  for (int i = 0; i < n; ++i) count += mask[i] != 0;
  return count;
}

// mask[i] = keys[i] >= key
template <class Key>
void write_at_least(const Key* keys /*[count]*/, int count, Key key, uint8_t* mask /*[count]*/) {
  for (int i = 0; i < count; ++i) mask[i] = keys[i] >= key;
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
