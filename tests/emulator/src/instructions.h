// What each PTX instruction does: handlers, as templates over the types of an opcode.
#pragma once

#include <cfenv>
#include <cmath>
#include <cstring>
#include <limits>

#include "machine.h"

namespace cudaemu {

#define HANDLER(name) Step name(Machine& m, Warp& w, const Instruction& i, uint32_t lanes)

template <class To, class A, class F>
inline Step apply(Warp& w, const Instruction& i, uint32_t lanes, F f) {
  const auto to = w.result<To>(i.to[0]);
  const auto a = w.source<A>(i.from[0]);
  each_lane(lanes, [=](uint32_t lane) { to.set(lane, f(a[lane])); });
  return kNext;
}
template <class To, class A, class B, class F>
inline Step apply(Warp& w, const Instruction& i, uint32_t lanes, F f) {
  const auto to = w.result<To>(i.to[0]);
  const auto a = w.source<A>(i.from[0]);
  const auto b = w.source<B>(i.from[1]);
  each_lane(lanes, [=](uint32_t lane) { to.set(lane, f(a[lane], b[lane])); });
  return kNext;
}
template <class To, class A, class B, class C, class F>
inline Step apply(Warp& w, const Instruction& i, uint32_t lanes, F f) {
  const auto to = w.result<To>(i.to[0]);
  const auto a = w.source<A>(i.from[0]);
  const auto b = w.source<B>(i.from[1]);
  const auto c = w.source<C>(i.from[2]);
  each_lane(lanes, [=](uint32_t lane) { to.set(lane, f(a[lane], b[lane], c[lane])); });
  return kNext;
}

// ---- Arithmetic on one type

template <class T, class F>
HANDLER(unary) {
  return apply<T, T>(w, i, lanes, F());
}
template <class T, class F>
HANDLER(binary) {
  return apply<T, T, T>(w, i, lanes, F());
}
template <class T, class F>
HANDLER(ternary) {
  return apply<T, T, T, T>(w, i, lanes, F());
}

// Integers wrap as in hardware, which only unsigned types do in C++.
template <class T>
using Wrapping =
    std::conditional_t<std::is_integral_v<T>, std::make_unsigned<T>, std::common_type<T>>;
template <class T>
using wrapping_t = typename Wrapping<T>::type;

#define OPERATION1(name, expression)               \
  template <class T>                               \
  struct name {                                    \
    T operator()(T a) const { return expression; } \
  };
#define OPERATION2(name, expression)                    \
  template <class T>                                    \
  struct name {                                         \
    T operator()(T a, T b) const { return expression; } \
  };

template <class T>
constexpr bool overflows(T b) {  // as a divisor of the lowest number
  return std::is_signed_v<T> && b == static_cast<T>(-1);
}

// clang-format off
OPERATION1(Not, static_cast<T>(~a))
OPERATION1(Neg, static_cast<T>(0 - static_cast<wrapping_t<T>>(a)))
OPERATION1(Abs, a < 0 ? Neg<T>()(a) : a)
OPERATION1(NegFloat, -a)
OPERATION1(AbsFloat, std::fabs(a))
OPERATION1(Reciprocal, T(1) / a)
OPERATION2(Add, static_cast<T>(static_cast<wrapping_t<T>>(a) + static_cast<wrapping_t<T>>(b)))
OPERATION2(Sub, static_cast<T>(static_cast<wrapping_t<T>>(a) - static_cast<wrapping_t<T>>(b)))
OPERATION2(MulLo, static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b)))
OPERATION2(Mul, a * b)
OPERATION2(Div, a / b)
OPERATION2(DivInt, b == 0 ? static_cast<T>(~T(0)) : overflows(b) ? Neg<T>()(a) : static_cast<T>(a / b))
OPERATION2(Rem, b == 0 ? a : overflows(b) ? T(0) : static_cast<T>(a % b))
OPERATION2(And, static_cast<T>(a & b))
OPERATION2(Or, static_cast<T>(a | b))
OPERATION2(Xor, static_cast<T>(a ^ b))
OPERATION2(CopySign, std::copysign(b, a))  // of the first, on the second
OPERATION2(Min, a < b ? a : b)
OPERATION2(Max, a < b ? b : a)
// clang-format on

// Of a NaN and a number the number; -0 is below +0.
template <class T, bool is_max>
T extreme(T a, T b) {
  const T ordered = (a < b) == is_max ? b : a;
  const T zero = std::signbit(a) == is_max ? b : a;
  const T number = a == b ? zero : ordered;
  const T right = std::isnan(b) ? a : number;
  const T left = std::isnan(a) ? b : right;
  return std::isnan(left) ? std::numeric_limits<T>::quiet_NaN() : left;
}
template <class T>
struct MinFloat {
  T operator()(T a, T b) const { return extreme<T, false>(a, b); }
};
template <class T>
struct MaxFloat {
  T operator()(T a, T b) const { return extreme<T, true>(a, b); }
};
template <class T>
struct Fma {
  T operator()(T a, T b, T c) const { return std::fma(a, b, c); }
};
template <class T>
struct MadLo {
  T operator()(T a, T b, T c) const {
    return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b) +
                          static_cast<uint64_t>(c));
  }
};
template <int mode>
struct FmaRounded {
  float operator()(float a, float b, float c) const {
    const int before = fegetround();
    fesetround(mode);
    volatile float x = a, y = b, z = c;
    volatile float result = fmaf(x, y, z);
    fesetround(before);
    return result;
  }
};

template <class Wide, class T>
HANDLER(mul_wide) {
  return apply<Wide, T, T>(w, i, lanes,
                           [](T a, T b) { return static_cast<Wide>(a) * static_cast<Wide>(b); });
}
template <class T>
HANDLER(mul_hi) {
  using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  return apply<T, T, T>(w, i, lanes, [](T a, T b) {
    return static_cast<T>((static_cast<Wide>(a) * static_cast<Wide>(b)) >> (8 * sizeof(T)));
  });
}

// ---- Bits

template <class T>
HANDLER(shl) {
  return apply<T, T, uint32_t>(w, i, lanes, [](T a, uint32_t by) {
    return by >= 8 * sizeof(T) ? T(0) : static_cast<T>(static_cast<uint64_t>(a) << (by & 63));
  });
}
template <class T>
HANDLER(shr) {
  return apply<T, T, uint32_t>(w, i, lanes, [](T a, uint32_t by) {
    constexpr uint32_t kLast = 8 * sizeof(T) - 1;
    if (std::is_signed_v<T>) return static_cast<T>(a >> std::min(by, kLast));
    return by > kLast ? T(0) : static_cast<T>(a >> (by & kLast));
  });
}
inline HANDLER(bmsk_clamp) {
  return apply<uint32_t, uint32_t, uint32_t>(w, i, lanes, [](uint32_t at, uint32_t width) {
    const uint64_t bits = width >= 32 ? 0xffffffffull : (1ull << width) - 1;
    return at >= 32 ? 0 : static_cast<uint32_t>(bits << at);
  });
}
template <class T>
HANDLER(popc) {
  return apply<uint32_t, T>(w, i, lanes, [](T a) { return __builtin_popcountll(a); });
}
template <class T>
HANDLER(clz) {
  return apply<uint32_t, T>(w, i, lanes, [](T a) {
    return a == 0 ? 8 * sizeof(T) : __builtin_clzll(a) - (64 - 8 * sizeof(T));
  });
}
inline uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = low | static_cast<uint64_t>(high) << 32;
  uint32_t result = 0;
  for (int k = 0; k < 4; ++k) {
    const uint32_t s = selector >> (4 * k);
    uint8_t byte = bytes >> (8 * (s & 7));
    if (s & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= static_cast<uint32_t>(byte) << (8 * k);
  }
  return result;
}
inline HANDLER(prmt) {
  return apply<uint32_t, uint32_t, uint32_t, uint32_t>(w, i, lanes, permute_bytes);
}

// ---- Moves

template <class T>
HANDLER(mov) {
  return apply<T, T>(w, i, lanes, [](T a) { return a; });
}
template <class Whole, class Part>
HANDLER(pack) {
  constexpr int kParts = sizeof(Whole) / sizeof(Part);
  each_lane(lanes, [&](uint32_t lane) {
    Whole whole = 0;
    for (int k = 0; k < kParts; ++k) {
      whole |= static_cast<Whole>(w.get<Part>(i.from[k], lane)) << (8 * sizeof(Part) * k);
    }
    w.set<Whole>(i.to[0], lane, whole);
  });
  return kNext;
}
template <class Whole, class Part>
HANDLER(unpack) {
  constexpr int kParts = sizeof(Whole) / sizeof(Part);
  const auto from = w.source<Whole>(i.from[0]);
  for (uint32_t left = lanes; left; left &= left - 1) {
    const uint32_t lane = first_lane(left);
    const Whole whole = from[lane];  // may share a slot with a part
    for (int k = 0; k < kParts; ++k) {
      w.set<Part>(i.to[k], lane, static_cast<Part>(whole >> (8 * sizeof(Part) * k)));
    }
  }
  return kNext;
}
inline uint32_t special_value(const Machine& m, const Warp& w, uint32_t lane, uint32_t which) {
  const Dim id = w.id[lane], block = m.launch->block, grid = m.launch->grid;
  const uint32_t bit = 1u << lane;
  const uint32_t values[] = {id.x,
                             id.y,
                             id.z,
                             block.x,
                             block.y,
                             block.z,
                             m.block_id.x,
                             m.block_id.y,
                             m.block_id.z,
                             grid.x,
                             grid.y,
                             grid.z,
                             lane,
                             w.index,
                             bit - 1,
                             bit | (bit - 1),
                             ~(bit | (bit - 1)),
                             ~(bit - 1),
                             bit,
                             m.block_id.x % 132};
  return values[which];
}
inline HANDLER(special) {
  const uint32_t which = w.get<uint32_t>(i.from[0], 0);
  each_lane(lanes, [&](uint32_t lane) {
    w.set<uint32_t>(i.to[0], lane, special_value(m, w, lane, which));
  });
  return kNext;
}

// ---- Comparisons: mode says which, flags whether a NaN makes it true

enum Comparison { kEq, kNe, kLt, kLe, kGt, kGe, kNum, kNan };

template <class T, int how>
bool compare(T a, T b, bool unordered) {
  const bool holds = how == kEq   ? a == b
                     : how == kNe ? a != b
                     : how == kLt ? a < b
                     : how == kLe ? a <= b
                     : how == kGt ? a > b
                                  : a >= b;
  if constexpr (std::is_floating_point_v<T>) {
    const bool nan = (a != a) | (b != b);
    if (how == kNum) return !nan;
    if (how == kNan) return nan;
    return nan ? unordered : holds;
  }
  return holds;
}
template <class T, int how>
Step setp_how(Warp& w, const Instruction& i, uint32_t lanes) {
  const bool unordered = i.flags & 1;
  return apply<uint8_t, T, T>(w, i, lanes,
                              [=](T a, T b) { return compare<T, how>(a, b, unordered); });
}
template <class T>
HANDLER(setp) {
  switch (i.mode) {
    case kEq: return setp_how<T, kEq>(w, i, lanes);
    case kNe: return setp_how<T, kNe>(w, i, lanes);
    case kLt: return setp_how<T, kLt>(w, i, lanes);
    case kLe: return setp_how<T, kLe>(w, i, lanes);
    case kGt: return setp_how<T, kGt>(w, i, lanes);
    case kGe: return setp_how<T, kGe>(w, i, lanes);
    case kNum: return setp_how<T, kNum>(w, i, lanes);
    default: return setp_how<T, kNan>(w, i, lanes);
  }
}
template <class T>
HANDLER(selp) {
  return apply<T, T, T, uint8_t>(w, i, lanes, [](T a, T b, uint8_t c) { return c & 1 ? a : b; });
}
enum Logic { kAnd, kOr, kXor, kNot, kCopy };
template <int what>
HANDLER(pred) {
  if (what == kNot) return apply<uint8_t, uint8_t>(w, i, lanes, [](uint8_t a) { return ~a & 1; });
  if (what == kCopy) return apply<uint8_t, uint8_t>(w, i, lanes, [](uint8_t a) { return a & 1; });
  return apply<uint8_t, uint8_t, uint8_t>(w, i, lanes, [](uint8_t a, uint8_t b) {
    return (what == kAnd ? a & b : what == kOr ? a | b : a ^ b) & 1;
  });
}

// ---- Conversions: mode is the rounding: n, i (nearest), z, m (down), p (up)

inline float half_to_float(uint16_t h) {
  _Float16 value;
  memcpy(&value, &h, 2);
  return static_cast<float>(value);
}
inline uint16_t float_to_half(float x) {
  const _Float16 value = static_cast<_Float16>(x);
  uint16_t bits;
  memcpy(&bits, &value, 2);
  return std::isnan(x) ? 0x7fff : bits;
}
inline uint32_t float_to_bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return x != x ? 0x7fff : (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
}

template <class T>
T round_to_integer(T x, int mode) {
  return mode == 'i'   ? std::nearbyint(x)
         : mode == 'm' ? std::floor(x)
         : mode == 'p' ? std::ceil(x)
                       : std::trunc(x);
}
template <class To>
To integer_of(double x, int mode) {
  constexpr To kLow = std::numeric_limits<To>::min(), kHigh = std::numeric_limits<To>::max();
  if (std::isnan(x)) return sizeof(To) == 8 ? kLow : To(0);
  const double whole = round_to_integer(x, mode);
  if (whole <= static_cast<double>(kLow)) return kLow;
  if (whole >= static_cast<double>(kHigh)) return kHigh;
  return static_cast<To>(whole);
}
template <class To, class From>
HANDLER(convert) {
  const int mode = i.mode;
  return apply<To, From>(w, i, lanes, [=](From a) {
    if constexpr (std::is_integral_v<To> && std::is_floating_point_v<From>) {
      return integer_of<To>(a, mode);
    } else {
      return static_cast<To>(a);
    }
  });
}
template <class T>
HANDLER(round_float) {
  const int mode = i.mode;
  return apply<T, T>(w, i, lanes, [=](T a) { return round_to_integer(a, mode); });
}
inline HANDLER(saturate) {  // NaN gives 0
  return apply<float, float>(w, i, lanes,
                             [](float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; });
}
inline HANDLER(float_from_half) { return apply<float, uint16_t>(w, i, lanes, half_to_float); }
inline HANDLER(half_from_float) { return apply<uint16_t, float>(w, i, lanes, float_to_half); }
inline HANDLER(bfloat16x2_from_floats) {
  return apply<uint32_t, float, float>(w, i, lanes, [](float high, float low) {
    return float_to_bfloat16(high) << 16 | float_to_bfloat16(low);
  });
}

// ---- Approximate instructions: exact, but for Machine::approximation_error

inline float flush(float x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x;
}
inline double flush(double x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0, x) : x;
}

template <bool ftz>
HANDLER(ex2) {
  return apply<float, float>(w, i, lanes, [&](float a) {
    const float x = ftz ? flush(a) : a;
    // Powers of two are exact, which libdevice's exp and tanh build on.
    const double exact = std::exp2(static_cast<double>(x));
    const float y = static_cast<float>(x == std::rint(x) ? exact : m.approximate(exact));
    return ftz ? flush(y) : y;
  });
}
inline HANDLER(rcp_approx_f32) {
  return apply<float, float>(w, i, lanes, [&](float a) {
    return flush(static_cast<float>(m.approximate(1.0 / static_cast<double>(flush(a)))));
  });
}
inline uint64_t rcp_approx_bits(double x) {  // the upper word alone, within 2^-20
  const double y = flush(1.0 / flush(x));
  uint64_t bits;
  memcpy(&bits, &y, 8);
  return std::isnan(y) ? bits : bits & 0xffffffff00000000ull;
}
inline HANDLER(rcp_approx_f64) { return apply<uint64_t, double>(w, i, lanes, rcp_approx_bits); }

// ---- Memory: mode is the space

struct Addresses {
  uint64_t of[kLanes] = {};

  Addresses(const Warp& w, const Instruction& i, uint32_t lanes) {
    const uint64_t mask = i.mode == kGlobal ? ~uint64_t{0} : 0xffffffff;
    const auto base = w.source<uint64_t>(i.from[0]);
    const int64_t offset = i.offset;
    each_lane(lanes, [=](uint32_t lane) { of[lane] = (base[lane] & mask) + offset; });
  }
};

// The host's pointer to an address of the space.
inline uint8_t* host_pointer(Machine& m, int space, uint64_t address) {
  if (space == kGlobal) return reinterpret_cast<uint8_t*>(address);
  if (space == kShared) return m.shared_bytes() + address;
  return const_cast<uint8_t*>(m.launch->parameters.data()) + address;
}

inline bool check_access(Machine& m, const Warp& w, const Instruction& i, uint32_t lanes,
                         const Addresses& addresses, uint32_t size, int kind) {
  if (i.mode == kGlobal) return m.global(w, i, lanes, addresses.of, size, kind);
  if (i.mode == kShared) return m.shared(w, i, lanes, addresses.of, size, kind);
  return m.parameter(w, i, lanes, addresses.of, size);
}

template <class T>
HANDLER(load) {
  const Addresses addresses(w, i, lanes);
  if (!check_access(m, w, i, lanes, addresses, sizeof(T) * i.count, kRead | i.flags)) return kNext;
  for (uint32_t left = lanes; left; left &= left - 1) {
    const uint32_t lane = first_lane(left);
    const uint8_t* from = host_pointer(m, i.mode, addresses.of[lane]);
    for (int k = 0; k < i.count; ++k) {
      T value;
      memcpy(&value, from + k * sizeof(T), sizeof(T));
      w.set<T>(i.to[k], lane, value);
    }
  }
  return kNext;
}
template <class T>
HANDLER(store) {
  const Addresses addresses(w, i, lanes);
  if (!check_access(m, w, i, lanes, addresses, sizeof(T) * i.count, kWrite | i.flags)) return kNext;
  for (uint32_t left = lanes; left; left &= left - 1) {
    const uint32_t lane = first_lane(left);
    uint8_t* to = host_pointer(m, i.mode, addresses.of[lane]);
    for (int k = 0; k < i.count; ++k) {
      const T value = w.get<T>(i.from[1 + k], lane);
      memcpy(to + k * sizeof(T), &value, sizeof(T));
    }
  }
  return kNext;
}
template <class T, class F>
HANDLER(atomic) {
  const Addresses addresses(w, i, lanes);
  if (!check_access(m, w, i, lanes, addresses, sizeof(T), kAtomic)) return kNext;
  for (uint32_t left = lanes; left; left &= left - 1) {
    const uint32_t lane = first_lane(left);
    uint8_t* at = host_pointer(m, i.mode, addresses.of[lane]);
    T old;
    memcpy(&old, at, sizeof(T));
    const T value = F()(old, w.get<T>(i.from[1], lane));
    memcpy(at, &value, sizeof(T));
    w.set<T>(i.to[0], lane, old);
  }
  return kNext;
}

// ---- Control and collectives

inline HANDLER(leave) {
  w.exited |= lanes;
  return kExits;
}
inline HANDLER(nothing) { return kNext; }
inline HANDLER(barrier) {
  w.at_barrier |= lanes;
  return kWaits;
}
inline HANDLER(collective) { return m.collective(w, i, lanes); }

}  // namespace cudaemu
