#include "json.h"

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>

namespace edge_kv {
namespace {

constexpr int kDepth = 64;

[[noreturn]] void refuse(const std::string& what) { throw JsonError(what); }

class Parser {
 public:
  explicit Parser(const std::string& text) : at_(text.c_str()), end_(at_ + text.size()) {}

  Json whole() {
    Json value = read(0);
    skip();
    if (at_ != end_) refuse("something follows its end");
    return value;
  }

 private:
  Json read(int depth) {
    if (depth > kDepth) refuse("it is nested too deeply");
    skip();
    Json value;
    const char c = peek();
    if (c == '{' || c == '[') {
      value.kind = c;
      list(value, c == '{' ? '}' : ']', depth);
    } else if (c == '"') {
      value.kind = c;
      value.text = quoted();
    } else {
      value.kind = c == '-' || (c >= '0' && c <= '9') ? '0' : 'n';
      while (at_ != end_ && *at_ && (isalnum(static_cast<unsigned char>(*at_)) || strchr("+-.", *at_)))
        value.text += *at_++;
      const bool word = value.text == "null" || value.text == "true" || value.text == "false";
      if (value.kind == '0' ? !number(value.text) : !word) refuse("it is no JSON");
    }
    return value;
  }

  void list(Json& value, char close, int depth) {
    ++at_;
    for (skip(); peek() != close; skip()) {
      if (!value.items.empty()) {
        take(',');
        skip();
      }
      if (close == '}') {
        value.keys.push_back(quoted());
        skip();
        take(':');
      }
      value.items.push_back(read(depth + 1));
    }
    ++at_;
  }

  std::string quoted() {
    take('"');
    std::string text;
    for (; peek() != '"'; text += *at_++)
      if (*at_ == '\\') {
        text += *at_++;
        peek();
      }
    ++at_;
    return text;
  }

  static bool number(const std::string& text) {
    char* end;
    strtod(text.c_str(), &end);
    return *end == 0;
  }

  char peek() const {
    if (at_ == end_) refuse("it is cut off");
    return *at_;
  }
  void take(char wanted) {
    if (peek() != wanted) refuse("it is no JSON");
    ++at_;
  }
  void skip() {
    while (at_ != end_ && strchr(" \t\r\n", *at_) && *at_) ++at_;
  }

  const char *at_, *end_;
};

}  // namespace

const Json* Json::find(const std::string& key) const {
  const auto found = std::find(keys.begin(), keys.end(), key);
  return found == keys.end() ? nullptr : &items[size_t(found - keys.begin())];
}

const Json& Json::at(const std::string& key) const {
  const Json* found = find(key);
  if (!found) refuse("it has no " + key);
  return *found;
}

const std::string& Json::string() const {
  if (kind != '"') refuse("a string is something else");
  return text;
}

int64_t Json::integer() const {
  char* end = nullptr;
  errno = 0;
  const int64_t value = kind == '0' ? strtoll(text.c_str(), &end, 10) : 0;
  if (!end || *end || errno) refuse("a whole number is something else");
  return value;
}

Json parse_json(const std::string& text) { return Parser(text).whole(); }

std::string text_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

}  // namespace edge_kv
