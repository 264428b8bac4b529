// Reads experts of a mixture from a file as a decoder would, in one of several ways; see
// expert_reads.py. Prints one JSON object.
//   expert_reads FILE MODE layers=40 experts=16 chosen=1 bytes=12582912 tokens=24 warm=8 skew=0
//                bank=0 threads=2
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <list>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

namespace {

std::map<std::string, double> given{{"layers", 40}, {"experts", 16}, {"chosen", 1}, {"bytes", 12582912},
                                    {"tokens", 24}, {"warm", 8},     {"skew", 0},   {"bank", 0},
                                    {"threads", 2}};

[[noreturn]] void die(const char* what) {
  perror(what);
  exit(1);
}

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

uint64_t storage_bytes() {  // that this process made the device read
  FILE* file = fopen("/proc/self/io", "r");
  char line[128];
  unsigned long long found = 0;
  while (file && fgets(line, sizeof line, file)) sscanf(line, "read_bytes: %llu", &found);
  if (file) fclose(file);
  return found;
}

void in_parallel(int threads, const auto& work) {
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back([&, i] { work(i); });
  work(0);
  for (std::thread& other : others) other.join();
}

uint64_t sum(const char* data, size_t bytes) {  // stands for the products: every line is read once
  const auto* words = reinterpret_cast<const uint64_t*>(data);
  uint64_t a = 0, b = 0, c = 0, d = 0;
  for (size_t i = 0; i + 8 <= bytes / 8; i += 8) {
    a += words[i] + words[i + 4];
    b += words[i + 1] + words[i + 5];
    c += words[i + 2] + words[i + 6];
    d += words[i + 3] + words[i + 7];
  }
  return a ^ b ^ c ^ d;
}

}  // namespace

int main(int count, char** words) {
  if (count < 3) return fprintf(stderr, "expert_reads FILE MODE [name=value ...]\n"), 2;
  for (int i = 3; i < count; ++i) {
    const std::string word = words[i];
    const size_t at = word.find('=');
    if (at == std::string::npos || !given.count(word.substr(0, at))) return 2;
    given[word.substr(0, at)] = atof(word.c_str() + at + 1);
  }
  const std::string mode = words[2];
  const int layers = int(given["layers"]), experts = int(given["experts"]);
  const int chosen = int(given["chosen"]), threads = int(given["threads"]);
  const size_t bytes = size_t(given["bytes"]);
  const bool direct = mode == "direct";
  const int file = open(words[1], O_RDONLY | (direct ? O_DIRECT : 0));
  struct stat about;
  if (file < 0 || fstat(file, &about)) die(words[1]);
  if (size_t(about.st_size) < bytes * size_t(layers) * size_t(experts)) {
    return fprintf(stderr, "%s is too short\n", words[1]), 1;
  }
  const bool banked = direct || mode == "bank";
  char* mapped = nullptr;
  if (!banked) {
    mapped = static_cast<char*>(mmap(nullptr, size_t(about.st_size), PROT_READ, MAP_SHARED, file, 0));
    if (mapped == MAP_FAILED) die("mmap");
  }
  // An LRU of whole experts in anonymous memory.
  const size_t places = banked ? std::max<size_t>(size_t(given["bank"]) / bytes, size_t(chosen)) : 0;
  char* bank = nullptr;
  if (banked) {
    bank = static_cast<char*>(mmap(nullptr, places * bytes, PROT_READ | PROT_WRITE,
                                   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (bank == MAP_FAILED) die("mmap of the bank");
  }
  std::list<std::pair<int64_t, size_t>> order;  // the most recent first: expert, place
  std::unordered_map<int64_t, std::list<std::pair<int64_t, size_t>>::iterator> held;

  std::mt19937_64 random(1);
  std::vector<double> shares(size_t(experts), 1.0);
  for (int i = 0; i < experts; ++i) shares[size_t(i)] = std::pow(i + 1.0, -given["skew"]);
  std::discrete_distribution<int> pick(shares.begin(), shares.end());
  std::vector<std::vector<int>> last{size_t(layers), std::vector<int>{}};  // what the token before chose

  const auto advise = [&](int layer, const std::vector<int>& which) {
    for (int expert : which)
      madvise(mapped + (size_t(layer) * size_t(experts) + size_t(expert)) * bytes, bytes,
              MADV_WILLNEED);
  };
  const auto fetch = [&](int64_t number) -> const char* {
    if (const auto found = held.find(number); found != held.end()) {
      order.splice(order.begin(), order, found->second);
      return bank + found->second->second * bytes;
    }
    size_t place = held.size();
    if (held.size() == places) {
      place = order.back().second;
      held.erase(order.back().first);
      order.pop_back();
    }
    char* const to = bank + place * bytes;
    const size_t step = 1 << 20;
    in_parallel(threads, [&](int thread) {
      for (size_t at = size_t(thread) * step; at < bytes; at += step * size_t(threads)) {
        const size_t size = std::min(step, bytes - at);
        if (pread(file, to + at, size, off_t(size_t(number) * bytes + at)) != ssize_t(size))
          die("pread");
      }
    });
    if (!direct)
      posix_fadvise(file, off_t(size_t(number) * bytes), off_t(bytes), POSIX_FADV_DONTNEED);
    order.emplace_front(number, place);
    held[number] = order.begin();
    return to;
  };

  std::vector<double> seconds;
  uint64_t begin = 0, check = 0;
  for (int token = 0; token < int(given["warm"] + given["tokens"]); ++token) {
    if (token == int(given["warm"])) begin = storage_bytes();
    const double start = now();
    for (int layer = 0; layer < layers; ++layer) {
      std::vector<int> which;
      while (int(which.size()) < chosen) {
        // experts are spread differently in every layer
        const int expert = int((int64_t(pick(random)) * 7 + layer * 3) % experts);
        if (std::find(which.begin(), which.end(), expert) == which.end()) which.push_back(expert);
      }
      if (mode == "willneed" || mode == "ahead") advise(layer, which);
      if (mode == "ahead") advise((layer + 1) % layers, last[size_t((layer + 1) % layers)]);
      for (int expert : which) {
        const int64_t number = int64_t(layer) * experts + expert;
        const char* data = banked ? fetch(number) : mapped + size_t(number) * bytes;
        std::vector<uint64_t> sums(size_t(threads), 0);
        in_parallel(threads, [&](int thread) {
          const size_t part = bytes / size_t(threads) & ~size_t(63);
          sums[size_t(thread)] = sum(data + size_t(thread) * part, part);
        });
        for (uint64_t s : sums) check += s;
      }
      last[size_t(layer)] = which;
    }
    if (token >= int(given["warm"])) seconds.push_back(now() - start);
  }
  const double read = double(storage_bytes() - begin) / double(seconds.size());
  std::sort(seconds.begin(), seconds.end());
  printf("{\"mode\": \"%s\", \"seconds_per_token\": %.5f, \"worst\": %.5f, \"storage_bytes_per_token\": "
         "%.0f, \"check\": %llu}\n",
         mode.c_str(), seconds[seconds.size() / 2], seconds.back(), read, (unsigned long long)check);
  return 0;
}
