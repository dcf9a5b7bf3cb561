// What Python asks of the emulator (device.py). Strings are valid until the next call.
#include "runtime.h"

using namespace cudaemu;

extern "C" {

// Reports since the last call, one a line.
const char* cudaemu_reports() {
  Lock lock;
  static std::string text;
  text.clear();
  for (const std::string& line : machine().reports) text += line + "\n";
  machine().reports.clear();
  return text.c_str();
}

// "kernel \t times" of every kernel that ran.
const char* cudaemu_launches() {
  Lock lock;
  static std::string text;
  text.clear();
  for (const auto& [name, count] : launches()) text += name + "\t" + std::to_string(count) + "\n";
  return text.c_str();
}

// "kernel \t PTX line \t opcode \t file:line \t times" of every instruction that ran since the last
// call.
const char* cudaemu_profile() {
  Lock lock;
  static std::string text;
  text.clear();
  each_function([](const Module& module, Function& function) {
    for (size_t k = 0; k < function.code.size(); ++k) {
      const Instruction& i = function.code[k];
      if (function.executed[k] == 0) continue;
      const auto file = module.files.find(i.file);
      text += function.name + "\t" + std::to_string(i.line) + "\t" +
              (i.line ? module.opcodes[i.opcode] : "exit") + "\t" +
              (file == module.files.end() ? "" : file->second) + ":" +
              std::to_string(i.source_line) + "\t" + std::to_string(function.executed[k]) + "\n";
      function.executed[k] = 0;
    }
  });
  return text.c_str();
}

// seed: 0, or the random order in which threads run; approximation_error: see machine.h.
void cudaemu_set(unsigned long long seed, double approximation_error, int check_races) {
  machine().seed = seed;
  machine().approximation_error = approximation_error;
  machine().check_races = check_races;
}

void cudaemu_set_most_instructions(unsigned long long count) {
  machine().most_instructions = count;
}

void cudaemu_load_ptx(const char* file) { load_ptx(file); }

unsigned long long cudaemu_executed() { return machine().executed; }

void cudaemu_mark_written(void* pointer, size_t size) {
  Lock lock;
  machine().memory.mark_written(reinterpret_cast<uint64_t>(pointer), size);
}

void cudaemu_enqueue(void* stream, void (*function)(long long), long long argument) {
  enqueue(static_cast<cudaStream_t>(stream), [=] {
    function(argument);
    return cudaSuccess;
  });
}

int cudaemu_is_capturing(void* stream) { return is_capturing(static_cast<cudaStream_t>(stream)); }

}  // extern "C"
