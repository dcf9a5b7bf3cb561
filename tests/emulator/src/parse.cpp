// Parses PTX text into the instructions of ptx.h.
#include <algorithm>
#include <cctype>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string_view>

#include "ptx.h"

namespace cudaemu {
namespace {

struct Token {
  std::string text;
  uint32_t line;
};

bool is_word(char c) {
  return isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' || c == '.';
}

// Splits PTX into words, numbers and single characters. A .loc directive becomes one token; what
// only debuggers read is dropped.
class Tokenizer {
 public:
  Tokenizer(const std::string& text, Module* module, uint32_t line)
      : text_(text), module_(module), line_(line) {}

  std::vector<Token> run() {
    while (at_ < text_.size()) {
      const char c = text_[at_];
      if (isspace(static_cast<unsigned char>(c))) {
        skip(1);
      } else if (text_.compare(at_, 2, "//") == 0) {
        skip_to(text_.find('\n', at_));
      } else if (text_.compare(at_, 2, "/*") == 0) {
        skip_to(text_.find("*/", at_) + 2);
      } else if (c == '"') {
        push(text_.find('"', at_ + 1) + 1);
      } else if (is_word(c)) {
        word();
      } else {
        push(at_ + 1);
      }
    }
    return std::move(tokens_);
  }

 private:
  void skip(size_t count) { skip_to(at_ + count); }
  void skip_to(size_t end) {
    for (end = std::min(end, text_.size()); at_ < end; ++at_) line_ += text_[at_] == '\n';
  }
  void push(size_t end) {
    tokens_.push_back({text_.substr(at_, end - at_), line_});
    at_ = end;
  }
  size_t end_of_word() const {
    size_t end = at_;
    while (end < text_.size() && is_word(text_[end])) {
      ++end;
      // "::" belongs to an opcode; ":" alone follows a label.
      if (text_.compare(end, 2, "::") == 0) end += 2;
    }
    return end;
  }
  void word() {
    const size_t end = end_of_word();
    const std::string word = text_.substr(at_, end - at_);
    const size_t end_of_line = std::min(text_.find('\n', at_), text_.size());
    if (word == ".loc") {
      push(end_of_line);
    } else if (word == ".file") {
      const std::string line = text_.substr(at_, end_of_line - at_);
      const size_t quote = line.find('"');
      module_->files[std::stoul(line.substr(5))] =
          line.substr(quote + 1, line.rfind('"') - quote - 1);
      skip_to(end_of_line);
    } else if (word == ".version" || word == ".target" || word == ".address_size") {
      skip_to(end_of_line);
    } else if (word == ".section") {
      skip_to(text_.find('}', at_) + 1);
    } else {
      push(end);
    }
  }

  const std::string& text_;
  Module* module_;
  uint32_t line_;
  size_t at_ = 0;
  std::vector<Token> tokens_;
};

uint32_t type_bytes(const std::string& type) {
  if (type == ".pred") return 1;
  const size_t digits = type.find_first_of("0123456789");
  return std::stoul(type.substr(digits)) / 8;
}

class Parser {
 public:
  Parser(const std::string& text, Module* module, uint32_t line)
      : module_(module), memory_(module->memory), tokens_(Tokenizer(text, module, line).run()) {}

  void module() {
    while (at_ < tokens_.size()) {
      if (is(".visible") || is(".weak") || is(".extern") || is(".common")) {
        next();
      } else if (is(".entry")) {
        entry();
      } else if (is(".global") || is(".const")) {
        variable();
      } else if (is(".pragma")) {
        skip_past(";");
      } else {
        fail("unknown directive");
      }
    }
  }

 private:
  [[noreturn]] void fail(const std::string& what) {
    const Token& token = tokens_[std::min(at_, tokens_.size() - 1)];
    throw std::runtime_error("PTX line " + std::to_string(token.line) + ": " + what + " at '" +
                             token.text + "'");
  }
  const std::string& text() const { return tokens_[at_].text; }
  bool is(const char* word) const { return at_ < tokens_.size() && tokens_[at_].text == word; }
  std::string next() { return tokens_[at_++].text; }
  void expect(const char* word) {
    if (!is(word)) fail(std::string("expected '") + word + "'");
    ++at_;
  }
  void skip_past(const char* word) {
    while (!is(word)) ++at_;
    ++at_;
  }

  // [.align N] .type name [\[N\]] -> name, size, alignment
  struct Declaration {
    std::string name;
    uint32_t size, align;
  };
  Declaration declaration() {
    uint32_t align = 0;
    while (is(".align") || is(".ptr") || is(".global")) {
      if (next() == ".align") align = std::stoul(next());
    }
    const uint32_t bytes = type_bytes(next());
    Declaration found{next(), bytes, align ? align : bytes};
    while (is("[")) {
      next();
      found.size = is("]") ? 0 : found.size * std::stoul(next());
      expect("]");
    }
    return found;
  }

  void variable() {
    next();
    const Declaration found = declaration();
    std::vector<char> bytes(found.size);
    if (is("=")) {  // initialisers are bytes in all that nvcc writes
      next();
      if (is("{")) next();
      for (size_t k = 0; !is(";"); ++k) {
        if (is(",") || is("}")) {
          next();
          --k;
          continue;
        }
        if (k >= bytes.size()) fail("a variable of wide elements");
        bytes[k] = static_cast<char>(number());
      }
    }
    expect(";");
    void* to = memory_->allocate(bytes.size(), kEveryDevice);
    memcpy(to, bytes.data(), bytes.size());
    memory_->mark_written(reinterpret_cast<uint64_t>(to), bytes.size());
    module_->variables[found.name] = reinterpret_cast<uint64_t>(to);
  }

  static uint32_t place(uint32_t* end, const Declaration& what) {
    const uint32_t begin = (*end + what.align - 1) / what.align * what.align;
    *end = begin + what.size;
    return begin;
  }

  void entry() {
    expect(".entry");
    auto function = std::make_unique<Function>();
    function_ = function.get();
    function_->name = next();
    symbols_.clear(), registers_.clear(), constants_.clear(), labels_.clear(), jumps_.clear();
    scopes_.assign(1, {});
    location_ = {};
    parameters();
    launch_bounds();
    body();
    Instruction end;
    select_handler("exit", &end);
    function_->code.push_back(end);
    for (const auto& [index, label] : jumps_) {
      const auto found = labels_.find(label);
      if (found == labels_.end()) throw std::runtime_error("no label " + label);
      function_->code[index].target = found->second;
    }
    function_->executed.resize(function_->code.size());
    module_->functions[function_->name] = std::move(function);
  }

  void parameters() {
    expect("(");
    while (!is(")")) {
      if (is(",")) next();
      expect(".param");
      const Declaration parameter = declaration();
      const uint32_t offset = place(&function_->parameter_bytes, parameter);
      symbols_[parameter.name] = offset;
      function_->parameters.push_back({offset, parameter.size});
    }
    expect(")");
  }

  void launch_bounds() {
    while (!is("{")) {
      const std::string directive = next();
      if (directive != ".maxntid" && directive != ".reqntid") continue;
      function_->max_threads = 1;
      while (is_number(text())) {
        function_->max_threads *= std::stoul(next());
        if (is(",")) next();
      }
    }
  }

  void body() {
    int depth = 0;
    do {
      const std::string& word = text();
      if (word == "{") {
        next();
        if (depth++ > 0) scopes_.emplace_back();
      } else if (word == "}") {
        next();
        if (--depth > 0) scopes_.pop_back();
      } else if (word.rfind(".loc", 0) == 0) {
        location();
      } else if (word == ".reg") {
        registers();
      } else if (word == ".shared") {
        next();
        const Declaration found = declaration();
        if (found.size == 0) fail("dynamic shared memory is not supported");
        symbols_[found.name] = place(&function_->shared_bytes, found);
        expect(";");
      } else if (word == ".pragma") {
        skip_past(";");
      } else if (word[0] == '.') {
        fail("unknown directive");
      } else if (at_ + 1 < tokens_.size() && tokens_[at_ + 1].text == ":") {
        labels_[word] = function_->code.size();
        next(), next();
      } else {
        instruction();
      }
    } while (depth > 0);
  }

  // .reg type name, name<count>, ...;  A name with a count gets its slots where they are first
  // used.
  void registers() {
    next(), next();
    do {
      if (is(",")) next();
      const std::string name = next();
      if (is("<")) {
        skip_past(">");
      } else {
        scopes_.back()[name] = function_->slots++;
      }
    } while (is(","));
    expect(";");
  }

  // .loc file line column[, function_name name, inlined_at file line column]
  void location() {
    std::istringstream in(next());
    std::string word;
    uint32_t column;
    location_ = {};
    in >> word >> location_.file >> location_.source_line >> column >> word;
    while (in >> word) {
      if (word == "inlined_at") in >> location_.outer_file >> location_.outer_line;
    }
  }

  Operand constant(uint64_t value) {
    const uint32_t end = function_->constants.size() / kLanes;
    const auto [found, is_new] = constants_.try_emplace(value, end);
    if (is_new) function_->constants.insert(function_->constants.end(), kLanes, value);
    return {1, found->second};
  }

  uint32_t slot(const std::string& name) {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      const auto found = scope->find(name);
      if (found != scope->end()) return found->second;
    }
    const auto [found, is_new] = registers_.try_emplace(name, function_->slots);
    if (is_new) ++function_->slots;
    return found->second;
  }

  static bool is_number(const std::string& word) {
    return isdigit(static_cast<unsigned char>(word[0]));
  }
  uint64_t number() {
    const bool negative = is("-");
    if (negative) next();
    const std::string word = next();
    uint64_t value;
    if (word[0] == '0' && word.size() > 2 &&
        (word[1] == 'f' || word[1] == 'F' || word[1] == 'd' || word[1] == 'D')) {
      value = std::stoull(word.substr(2), nullptr, 16);
    } else {
      value = std::stoull(word, nullptr, 0);
    }
    return negative ? -value : value;
  }

  // The number of a special register: the `special` instruction's constant operand.
  static int special_register(const std::string& name) {
    static const char* const names[] = {
        "%tid.x",       "%tid.y",       "%tid.z",       "%ntid.x",      "%ntid.y",
        "%ntid.z",      "%ctaid.x",     "%ctaid.y",     "%ctaid.z",     "%nctaid.x",
        "%nctaid.y",    "%nctaid.z",    "%laneid",      "%warpid",      "%lanemask_lt",
        "%lanemask_le", "%lanemask_gt", "%lanemask_ge", "%lanemask_eq", "%smid"};
    for (int i = 0; i < static_cast<int>(std::size(names)); ++i) {
      if (name == names[i]) return i;
    }
    return -1;
  }

  Operand operand() {
    if (is("-") || is_number(text())) return constant(number());
    const std::string word = next();
    if (word == "_") return {0, 0};
    const auto symbol = symbols_.find(word);
    if (symbol != symbols_.end()) return constant(symbol->second);
    if (module_->variables.count(word)) return constant(module_->variables[word]);
    if (word[0] != '%' && !isalpha(static_cast<unsigned char>(word[0])))
      fail("unknown operand " + word);
    if (word.find('.') != std::string::npos) fail("unknown register " + word);
    return {0, slot(word)};
  }

  void address(Instruction* i) {
    expect("[");
    i->from[0] = operand();
    if (is("+")) {
      next();
      i->offset = static_cast<int64_t>(number());
    }
    expect("]");
  }

  // One operand or {one, ...}
  int vector(Operand* to) {
    if (!is("{")) {
      *to = operand();
      return 1;
    }
    int count = 0;
    next();
    while (!is("}")) {
      if (is(",")) next();
      to[count++] = operand();
    }
    next();
    return count;
  }

  void instruction() {
    Instruction i = location_;
    i.line = tokens_[at_].line;
    if (is("@")) {
      next();
      i.guarded = is("!") ? 2 : 1;
      if (i.guarded == 2) next();
      i.guard = slot(next());
    }
    std::string opcode = next();
    operands(&opcode, &i);
    expect(";");
    const auto known = std::find(module_->opcodes.begin(), module_->opcodes.end(), opcode);
    i.opcode = known - module_->opcodes.begin();
    if (known == module_->opcodes.end()) module_->opcodes.push_back(opcode);
    try {
      select_handler(opcode, &i);
    } catch (const std::exception& error) {
      throw std::runtime_error("PTX line " + std::to_string(i.line) + ": " + error.what());
    }
    function_->code.push_back(i);
  }

  // Reads operands. `mov` of a special register becomes "special", of a vector "pack" or "unpack".
  void operands(std::string* opcode, Instruction* i) {
    const auto starts = [&](const char* prefix) { return opcode->rfind(prefix, 0) == 0; };
    if (starts("mov.") && !is("{") && special_register(tokens_[at_ + 2].text) >= 0) {
      i->to[0] = operand();
      expect(",");
      i->from[0] = constant(special_register(next()));
      *opcode = "special";
    } else if (starts("bra")) {
      jumps_.emplace_back(function_->code.size(), next());
    } else if (starts("ld.")) {
      vector(i->to);
      expect(",");
      address(i);
    } else if (starts("st.") || starts("red.")) {
      address(i);
      expect(",");
      vector(i->from + 1);
    } else if (starts("atom.")) {
      i->to[0] = operand();
      expect(",");
      address(i);
      more_operands(1, i);
    } else if (starts("mov.b") && is("{")) {
      *opcode = "unpack" + opcode->substr(3) + ".v" + std::to_string(vector(i->to));
      expect(",");
      i->from[0] = operand();
    } else if (starts("mov.b") && tokens_[at_ + 2].text == "{") {
      i->to[0] = operand();
      expect(",");
      *opcode = "pack" + opcode->substr(3) + ".v" + std::to_string(vector(i->from));
    } else if (starts("bar.sync") || starts("bar.warp") || starts("barrier")) {  // no result
      i->from[0] = operand();
      more_operands(1, i);
    } else if (!is(";")) {
      i->to[0] = operand();
      if (is("|")) {
        next();
        i->to[1] = operand();
      }
      more_operands(0, i);
    }
  }

  // ", operand" as long as there are any, into from[first] and after it.
  void more_operands(int first, Instruction* i) {
    for (int k = first; is(","); ++k) {
      next();
      if (is("!")) fail("a negated operand");
      if (k == kMaxOperands) fail("too many operands");
      i->from[k] = operand();
    }
  }

  Module* module_;
  Memory* memory_;
  std::vector<Token> tokens_;
  size_t at_ = 0;
  Function* function_ = nullptr;
  std::map<std::string, uint64_t> symbols_;  // parameters and shared arrays -> offset
  std::map<std::string, uint32_t> registers_;
  std::vector<std::map<std::string, uint32_t>> scopes_;
  std::map<uint64_t, uint32_t> constants_;
  std::map<std::string, uint32_t> labels_;
  std::vector<std::pair<uint32_t, std::string>> jumps_;
  Instruction location_;
};

}  // namespace

std::unique_ptr<Module> parse_ptx(std::string text, Memory* memory) {
  auto module = std::make_unique<Module>();
  module->text = std::move(text);
  module->memory = memory;
  // Entries begin at the start of a line: `.visible .entry name(`. Variables come before them.
  size_t first = module->text.size();
  Module::Text* last = nullptr;
  uint32_t line = 1;
  for (size_t at = 0; at < module->text.size(); ++line) {
    const size_t stop = std::min(module->text.find('\n', at), module->text.size());
    const std::string_view words(module->text.data() + at, stop - at);
    const size_t entry = words.find(".entry ");
    if (!words.empty() && words[0] == '.' && entry != words.npos) {
      first = std::min(first, at);
      if (last) last->end = at;
      const std::string name(words.substr(entry + 7, words.find('(') - entry - 7));
      last = &module->entries[name];
      *last = {at, module->text.size(), line};
    } else if (words.find(".file") < 2) {
      const std::string directive(words);
      Tokenizer(directive, module.get(), line).run();
    }
    at = stop + 1;
  }
  Parser(module->text.substr(0, first), module.get(), 1).module();
  return module;
}

Function* Module::find(const std::string& name) {
  const auto parsed = functions.find(name);
  if (parsed != functions.end()) return parsed->second.get();
  const auto found = entries.find(name);
  if (found == entries.end()) return nullptr;
  const Text& entry = found->second;
  Parser(text.substr(entry.begin, entry.end - entry.begin), this, entry.line).module();
  return functions.at(name).get();
}

}  // namespace cudaemu
