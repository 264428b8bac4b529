// JSON as the runner reads it: a manifest and the header of a snapshot.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace edge_kv {

// Thrown by all that follows: the text is no JSON, or its values are not what they should be.
struct JsonError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Json {
  char kind = 'n';    // '{' '[' '"', '0' for a number, 'n' for null, true and false
  std::string text;   // a string between its quotes, a number or a word, as written
  std::vector<std::string> keys;  // of an object: those of `items`, as written
  std::vector<Json> items;

  const Json& at(const std::string& key) const;
  const Json* find(const std::string& key) const;  // null if there is none
  const std::string& string() const;
  int64_t integer() const;
};

Json parse_json(const std::string& text);

// What a file holds, "" if it cannot be read.
std::string text_of(const std::string& path);

}  // namespace edge_kv
