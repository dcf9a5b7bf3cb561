// From the name of an opcode to its handler. What no group below knows has none, and ends the
// process.
#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <unordered_map>

#include "instructions.h"

namespace cudaemu {
namespace {

struct Opcode {
  std::string text;
  std::vector<std::string> parts;

  explicit Opcode(const std::string& opcode) : text(opcode) {
    std::stringstream in(opcode);
    for (std::string part; std::getline(in, part, '.');) parts.push_back(part);
  }
  const std::string& name() const { return parts.front(); }
  const std::string& type() const { return parts.back(); }
  bool is(const char* other) const { return name() == other; }
  bool is_float() const { return type()[0] == 'f'; }
  bool has(const char* part) const {
    return std::find(parts.begin(), parts.end(), part) != parts.end();
  }
};

// ---- Handlers by type

template <template <class> class F>
Handler integers2(const std::string& type) {
  if (type == "s16" || type == "b16") return binary<int16_t, F<int16_t>>;
  if (type == "u16") return binary<uint16_t, F<uint16_t>>;
  if (type == "s32") return binary<int32_t, F<int32_t>>;
  if (type == "u32" || type == "b32") return binary<uint32_t, F<uint32_t>>;
  if (type == "s64") return binary<int64_t, F<int64_t>>;
  if (type == "u64" || type == "b64") return binary<uint64_t, F<uint64_t>>;
  return nullptr;
}
template <template <class> class F>
Handler integers1(const std::string& type) {
  if (type == "s16" || type == "b16" || type == "u16") return unary<int16_t, F<int16_t>>;
  if (type == "s32" || type == "u32" || type == "b32") return unary<int32_t, F<int32_t>>;
  if (type == "s64" || type == "u64" || type == "b64") return unary<int64_t, F<int64_t>>;
  return nullptr;
}
template <template <class> class F>
Handler floats2(const std::string& type) {
  if (type == "f32") return binary<float, F<float>>;
  if (type == "f64") return binary<double, F<double>>;
  return nullptr;
}
template <template <class> class F>
Handler floats1(const std::string& type) {
  if (type == "f32") return unary<float, F<float>>;
  if (type == "f64") return unary<double, F<double>>;
  return nullptr;
}

#define BY_TYPE(name)                                          \
  Handler name##_of(const std::string& type) {                 \
    if (type == "u8" || type == "b8") return name<uint8_t>;    \
    if (type == "s8") return name<int8_t>;                     \
    if (type == "u16" || type == "b16") return name<uint16_t>; \
    if (type == "s16") return name<int16_t>;                   \
    if (type == "u32" || type == "b32") return name<uint32_t>; \
    if (type == "s32") return name<int32_t>;                   \
    if (type == "u64" || type == "b64") return name<uint64_t>; \
    if (type == "s64") return name<int64_t>;                   \
    if (type == "f32") return name<float>;                     \
    if (type == "f64") return name<double>;                    \
    return nullptr;                                            \
  }
BY_TYPE(mov)
BY_TYPE(selp)
BY_TYPE(setp)
BY_TYPE(load)
BY_TYPE(store)

template <class From>
Handler convert_from(const std::string& to) {
  if (to == "u8") return convert<uint8_t, From>;
  if (to == "s8") return convert<int8_t, From>;
  if (to == "u16") return convert<uint16_t, From>;
  if (to == "s16") return convert<int16_t, From>;
  if (to == "u32") return convert<uint32_t, From>;
  if (to == "s32") return convert<int32_t, From>;
  if (to == "u64") return convert<uint64_t, From>;
  if (to == "s64") return convert<int64_t, From>;
  if (to == "f32") return convert<float, From>;
  if (to == "f64") return convert<double, From>;
  return nullptr;
}

// ---- Groups: each returns null for what is not its own

Handler control(const Opcode& op) {
  if (op.is("ret") || op.is("exit")) return leave;
  if (op.is("membar") || op.is("fence")) return nothing;
  if (op.is("special")) return special;
  return nullptr;
}

Handler predicates(const Opcode& op) {
  if (op.type() != "pred") return nullptr;
  if (op.is("and")) return pred<kAnd>;
  if (op.is("or")) return pred<kOr>;
  if (op.is("xor")) return pred<kXor>;
  if (op.is("not")) return pred<kNot>;
  if (op.is("mov")) return pred<kCopy>;
  return nullptr;
}

Handler memory_access(const Opcode& op, Instruction* i) {
  if (!op.is("ld") && !op.is("st")) return nullptr;
  bool has_space = false;
  for (size_t k = 1; k + 1 < op.parts.size(); ++k) {
    const std::string& part = op.parts[k];
    if (part == "global" || part == "shared" || part == "param") {
      i->mode = part == "global" ? kGlobal : part == "shared" ? kShared : kParam;
      has_space = true;
    } else if (part == "v2" || part == "v4") {
      i->count = part[1] - '0';
    } else if (part == "volatile" || part == "relaxed" || part == "acquire" || part == "release") {
      i->flags |= kVolatile;
    } else if (part != "cs" && part != "wb" && part != "nc" && part != "cg" && part != "ca" &&
               part != "gpu") {
      return nullptr;
    }
  }
  if (!has_space) return nullptr;
  return op.is("ld") ? load_of(op.type()) : store_of(op.type());
}

Handler atomic_access(const Opcode& op, Instruction* i) {
  if (!op.is("atom") || op.parts.size() != 4) return nullptr;
  if (op.parts[1] != "global" && op.parts[1] != "shared") return nullptr;
  i->mode = op.parts[1] == "global" ? kGlobal : kShared;
  const std::string what = op.parts[2] + "." + op.parts[3];
  if (what == "add.u32") return atomic<uint32_t, Add<uint32_t>>;
  if (what == "add.u64") return atomic<uint64_t, Add<uint64_t>>;
  if (what == "min.s32") return atomic<int32_t, Min<int32_t>>;
  if (what == "min.s64") return atomic<int64_t, Min<int64_t>>;
  return nullptr;
}

Handler moves(const Opcode& op) {
  if (op.is("mov")) return mov_of(op.type());
  if (op.text == "cvta.to.global.u64") return mov<uint64_t>;
  if (op.is("selp")) return selp_of(op.type());
  if (op.text == "pack.b16.v2") return pack<uint16_t, uint8_t>;
  if (op.text == "pack.b32.v2") return pack<uint32_t, uint16_t>;
  if (op.text == "pack.b32.v4") return pack<uint32_t, uint8_t>;
  if (op.text == "pack.b64.v2") return pack<uint64_t, uint32_t>;
  if (op.text == "pack.b64.v4") return pack<uint64_t, uint16_t>;
  if (op.text == "unpack.b16.v2") return unpack<uint16_t, uint8_t>;
  if (op.text == "unpack.b32.v2") return unpack<uint32_t, uint16_t>;
  if (op.text == "unpack.b32.v4") return unpack<uint32_t, uint8_t>;
  if (op.text == "unpack.b64.v2") return unpack<uint64_t, uint32_t>;
  if (op.text == "unpack.b64.v4") return unpack<uint64_t, uint16_t>;
  return nullptr;
}

Handler arithmetic(const Opcode& op) {
  const std::string& type = op.type();
  const bool is_float = op.is_float();
  if (op.is("add")) return is_float ? floats2<Add>(type) : integers2<Add>(type);
  if (op.is("sub")) return is_float ? floats2<Sub>(type) : integers2<Sub>(type);
  if (op.is("div")) {
    if (is_float) return op.has("rn") ? floats2<Div>(type) : nullptr;
    return integers2<DivInt>(type);
  }
  if (op.is("rem")) return integers2<Rem>(type);
  if (op.is("neg")) return is_float ? floats1<NegFloat>(type) : integers1<Neg>(type);
  if (op.is("abs")) return is_float ? floats1<AbsFloat>(type) : integers1<Abs>(type);
  if (op.is("min")) return is_float ? floats2<MinFloat>(type) : integers2<Min>(type);
  if (op.is("max")) return is_float ? floats2<MaxFloat>(type) : integers2<Max>(type);
  if (op.is("copysign")) return floats2<CopySign>(type);
  return nullptr;
}

Handler products(const Opcode& op) {
  const std::string& type = op.type();
  if (op.is("mul")) {
    if (op.is_float()) return floats2<Mul>(type);
    if (op.has("lo")) return integers2<MulLo>(type);
    if (op.text == "mul.wide.s32") return mul_wide<int64_t, int32_t>;
    if (op.text == "mul.wide.u32") return mul_wide<uint64_t, uint32_t>;
    if (op.text == "mul.wide.s16") return mul_wide<int32_t, int16_t>;
    if (op.text == "mul.wide.u16") return mul_wide<uint32_t, uint16_t>;
    if (op.text == "mul.hi.s32") return mul_hi<int32_t>;
    if (op.text == "mul.hi.u32") return mul_hi<uint32_t>;
    if (op.text == "mul.hi.s64") return mul_hi<int64_t>;
    if (op.text == "mul.hi.u64") return mul_hi<uint64_t>;
  }
  if (op.is("mad") && op.has("lo")) {
    if (type == "s32" || type == "u32") return ternary<uint32_t, MadLo<uint32_t>>;
    if (type == "s64" || type == "u64") return ternary<uint64_t, MadLo<uint64_t>>;
  }
  if (op.text == "fma.rn.f32") return ternary<float, Fma<float>>;
  if (op.text == "fma.rn.f64") return ternary<double, Fma<double>>;
  if (op.text == "fma.rm.f32") return ternary<float, FmaRounded<FE_DOWNWARD>>;
  return nullptr;
}

Handler bits(const Opcode& op) {
  const std::string& type = op.type();
  if (op.is("and")) return integers2<And>(type);
  if (op.is("or")) return integers2<Or>(type);
  if (op.is("xor")) return integers2<Xor>(type);
  if (op.is("not")) return integers1<Not>(type);
  if (op.text == "shl.b16") return shl<uint16_t>;
  if (op.text == "shl.b32") return shl<uint32_t>;
  if (op.text == "shl.b64") return shl<uint64_t>;
  if (op.is("shr")) {
    if (type == "s16") return shr<int16_t>;
    if (type == "u16" || type == "b16") return shr<uint16_t>;
    if (type == "s32") return shr<int32_t>;
    if (type == "u32" || type == "b32") return shr<uint32_t>;
    if (type == "s64") return shr<int64_t>;
    if (type == "u64" || type == "b64") return shr<uint64_t>;
  }
  if (op.text == "bmsk.clamp.b32") return bmsk_clamp;
  if (op.text == "popc.b32") return popc<uint32_t>;
  if (op.text == "popc.b64") return popc<uint64_t>;
  if (op.text == "clz.b32") return clz<uint32_t>;
  if (op.text == "clz.b64") return clz<uint64_t>;
  if (op.text == "prmt.b32") return prmt;
  return nullptr;
}

Handler comparison(const Opcode& op, Instruction* i) {
  if (!op.is("setp") || op.parts.size() != 3) return nullptr;
  static const std::unordered_map<std::string, Comparison> known = {
      {"eq", kEq}, {"ne", kNe}, {"lt", kLt}, {"le", kLe}, {"gt", kGt},   {"ge", kGe},
      {"lo", kLt}, {"ls", kLe}, {"hi", kGt}, {"hs", kGe}, {"num", kNum}, {"nan", kNan}};
  std::string how = op.parts[1];
  if (how.size() == 3 && how[2] == 'u') {  // true of a NaN
    how.pop_back();
    i->flags = 1;
  }
  const auto found = known.find(how);
  if (found == known.end()) return nullptr;
  i->mode = found->second;
  return setp_of(op.type());
}

Handler conversion(const Opcode& op, Instruction* i) {
  if (!op.is("cvt")) return nullptr;
  const std::string& from = op.type();
  const std::string& to = op.parts[op.parts.size() - 2];
  static const std::unordered_map<std::string, char> roundings = {
      {"rn", 'n'}, {"rni", 'i'}, {"rzi", 'z'}, {"rmi", 'm'}, {"rpi", 'p'}};
  char rounding = 0;
  bool is_saturated = false;
  for (size_t k = 1; k + 2 < op.parts.size(); ++k) {
    const auto found = roundings.find(op.parts[k]);
    if (found != roundings.end())
      rounding = found->second;
    else if (op.parts[k] == "sat")
      is_saturated = true;
    else
      return nullptr;
  }
  i->mode = rounding;
  if (is_saturated) return from == "f32" && to == "f32" && !rounding ? saturate : nullptr;
  if (op.text == "cvt.f32.f16") return float_from_half;
  if (op.text == "cvt.rn.f16.f32") return half_from_float;
  if (op.text == "cvt.rn.bf16x2.f32") return bfloat16x2_from_floats;
  if (to == from && rounding && rounding != 'n') {
    return to == "f32" ? round_float<float> : to == "f64" ? round_float<double> : Handler{};
  }
  if (from == "u8") return convert_from<uint8_t>(to);
  if (from == "s8") return convert_from<int8_t>(to);
  if (from == "u16") return convert_from<uint16_t>(to);
  if (from == "s16") return convert_from<int16_t>(to);
  if (from == "u32") return convert_from<uint32_t>(to);
  if (from == "s32") return convert_from<int32_t>(to);
  if (from == "u64") return convert_from<uint64_t>(to);
  if (from == "s64") return convert_from<int64_t>(to);
  if (from == "f32") return convert_from<float>(to);
  if (from == "f64") return convert_from<double>(to);
  return nullptr;
}

Handler reciprocals_and_powers(const Opcode& op) {
  if (op.text == "ex2.approx.ftz.f32") return ex2<true>;
  if (op.text == "ex2.approx.f32") return ex2<false>;
  if (op.text == "rcp.approx.ftz.f32") return rcp_approx_f32;
  if (op.text == "rcp.approx.ftz.f64") return rcp_approx_f64;
  if (op.text == "rcp.rn.f32") return unary<float, Reciprocal<float>>;
  if (op.text == "rcp.rn.f64") return unary<double, Reciprocal<double>>;
  return nullptr;
}

// flags: which operand holds the mask of lanes.
Handler synchronisation(const Opcode& op, Instruction* i) {
  if (op.is("shfl") && op.has("sync") && op.type() == "b32") {
    i->mode = op.has("up")     ? kShuffleUp
              : op.has("down") ? kShuffleDown
              : op.has("bfly") ? kShuffleBfly
                               : kShuffleIdx;
    i->flags = 3;
    return collective;
  }
  if (op.is("vote") && op.has("sync") && !op.has("uni")) {
    i->mode = op.has("ballot") ? kBallot : op.has("all") ? kAll : kAny;
    i->flags = 1;
    return collective;
  }
  if (op.text == "bar.warp.sync") {
    i->mode = kWarpSync;
    return collective;
  }
  if (op.text == "bar.sync") {
    i->mode = kBarrier;
    return barrier;
  }
  if (op.is("bar") && op.has("red")) {
    i->mode = op.has("and") ? kBarrierAnd : op.has("or") ? kBarrierOr : kBarrierPopc;
    return barrier;
  }
  return nullptr;
}

// Whether the opcode has a modifier that changes its result and that the groups do not look at.
bool has_unknown_modifier(const Opcode& op) {
  for (const char* modifier : {"ftz", "rz", "rm", "rp", "cc", "hi", "NaN", "xorsign", "sat"}) {
    const std::string name = modifier;
    const bool known = op.has("approx") || op.has("hi") || (name == "sat" && op.is("cvt")) ||
                       (name == "rm" && op.is("fma"));
    if (op.has(modifier) && !known) return true;
  }
  return false;
}

Handler find_handler(const Opcode& op, Instruction* i) {
  if (has_unknown_modifier(op)) return nullptr;
  for (const auto group :
       {control, predicates, moves, arithmetic, products, bits, reciprocals_and_powers}) {
    if (const Handler found = group(op)) return found;
  }
  for (const auto group : {memory_access, atomic_access, comparison, conversion, synchronisation}) {
    if (const Handler found = group(op, i)) return found;
  }
  return nullptr;
}

}  // namespace

void select_handler(const std::string& opcode, Instruction* instruction) {
  const Opcode op(opcode);
  if (op.is("bra")) return;  // carried out by Machine::run_lanes
  instruction->run = find_handler(op, instruction);
  if (!instruction->run) throw std::runtime_error("no handler for " + opcode);
}

}  // namespace cudaemu
