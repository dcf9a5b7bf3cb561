// PTX as the interpreter runs it: a function is a list of instructions whose operands are slots of
// a warp's register file, or constants.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "memory.h"

namespace cudaemu {

struct Machine;
struct Warp;
struct Instruction;

constexpr uint32_t kLanes = 32;
constexpr uint32_t kAllLanes = 0xffffffff;
constexpr int kMaxOperands = 6;

// What lanes do after an instruction.
enum Step { kNext, kWaits, kExits };

// A slot of 32 values, one a lane: base[is_constant][index * 32 + lane].
struct Operand {
  uint32_t is_constant = 0;
  uint32_t index = 0;  // 0: no operand
};

// Carries an instruction out for the lanes of a mask.
using Handler = Step (*)(Machine&, Warp&, const Instruction&, uint32_t lanes);

enum Space { kGlobal, kShared, kParam };
enum WarpOperation {
  kShuffleUp,
  kShuffleDown,
  kShuffleBfly,
  kShuffleIdx,
  kBallot,
  kAll,
  kAny,
  kWarpSync
};
enum BarrierOperation { kBarrier, kBarrierAnd, kBarrierOr, kBarrierPopc };

struct Instruction {
  Handler run = nullptr;       // null: a branch
  Operand to[4];               // destinations
  Operand from[kMaxOperands];  // sources; the first is the address of an access
  int64_t offset = 0;          // of an address
  uint32_t target = 0;         // of a branch
  uint32_t guard = 0;          // slot of the guard
  uint8_t guarded = 0;         // 1: runs where the guard is true, 2: where it is false
  uint8_t count = 1;           // elements of a vector access
  uint8_t mode = 0;            // comparison, rounding, space, WarpOperation or BarrierOperation
  uint8_t flags = 0;           // of the handler
  uint32_t line = 0;           // of the PTX
  uint32_t opcode = 0;         // index into Module::opcodes
  uint32_t file = 0, source_line = 0, outer_file = 0, outer_line = 0;
};

struct Parameter {
  uint32_t offset, size;
};

struct Function {
  std::string name;
  std::vector<Instruction> code;
  std::vector<uint64_t> constants;  // [slot][lane]
  std::vector<uint64_t> executed;   // by instruction: how many threads ran it
  std::vector<Parameter> parameters;
  uint32_t parameter_bytes = 0;
  uint32_t slots = 1;
  uint32_t shared_bytes = 0;  // static
  uint32_t max_threads = 0;   // of the launch bounds; 0: none
};

// One PTX file. Functions are parsed when they are first asked for.
struct Module {
  struct Text {
    size_t begin, end;
    uint32_t line;
  };
  std::string text;
  std::map<std::string, Text> entries;
  std::map<std::string, std::unique_ptr<Function>> functions;
  Memory* memory;
  std::map<std::string, uint64_t> variables;  // of the global space -> address, on every device
  std::vector<std::string> opcodes;
  std::map<uint32_t, std::string> files;

  // Null where there is none. Throws std::runtime_error with the line that the parser does not
  // know.
  Function* find(const std::string& name);
};

std::unique_ptr<Module> parse_ptx(std::string text, Memory* memory);

// Sets the handler of an opcode, with mode, flags and count. Throws where there is none.
void select_handler(const std::string& opcode, Instruction* instruction);

}  // namespace cudaemu
