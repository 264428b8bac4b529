#include "expert_bank.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <list>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

namespace edge_kv {
namespace {

constexpr size_t kSector = 4096;   // O_DIRECT reads whole ones, into memory aligned alike
constexpr int kReaders = 2;        // reads that storage is asked for at once
constexpr size_t kMostOfRead = 4 << 20;

// A part of a file that is mapped at begin … end - 1.
struct Mapping {
  uintptr_t begin, end;
  uint64_t offset;
  int file;  // opened to read past the page cache; -1: cannot be
};

// What of this process is mapped at `address`, from /proc/self/maps.
Mapping find_mapping(uintptr_t address) {
  FILE* maps = fopen("/proc/self/maps", "re");
  Mapping found{address, address, 0, -1};
  char* line = nullptr;
  size_t size = 0;
  while (maps && getline(&line, &size, maps) > 0) {
    unsigned long long begin, end, offset;
    int path = 0;
    if (sscanf(line, "%llx-%llx %*s %llx %*s %*s %n", &begin, &end, &offset, &path) < 3) continue;
    if (address < begin || address >= end) continue;
    found = {uintptr_t(begin), uintptr_t(end), offset, -1};
    line[strcspn(line, "\n")] = '\0';
    if (path && line[path] == '/') found.file = open(line + path, O_RDONLY | O_DIRECT | O_CLOEXEC);
    break;
  }
  free(line);
  if (maps) fclose(maps);
  return found;
}

enum class State { wanted, reading, here, failed };

struct Matrix {
  const char* data;  // where it is mapped, which is its name
  size_t bytes;
  Mapping from;
  char* memory = nullptr;  // whole sectors around it
  State state = State::wanted;
  int users = 0;  // wanted or taken and not released
  std::list<const char*>::iterator place{};  // in the order of use

  uint64_t first() const { return from.offset + (uintptr_t(data) - from.begin); }
  uint64_t begin() const { return first() / kSector * kSector; }
  size_t room() const {
    return size_t((first() + bytes + kSector - 1) / kSector * kSector - begin());
  }
};

bool read_whole(const Matrix& matrix) {
  size_t done = 0;
  const size_t least = size_t(matrix.first() - matrix.begin()) + matrix.bytes;  // a file may end here
  while (done < least) {
    const size_t size = std::min(kMostOfRead, matrix.room() - done);
    const ssize_t got =
        pread(matrix.from.file, matrix.memory + done, size, off_t(matrix.begin() + done));
    if (got <= 0) return false;
    done += size_t(got);
  }
  return true;
}

}  // namespace

struct ExpertBank::Shelf {
  size_t capacity, used = 0;
  std::mutex lock;
  std::condition_variable changed;
  std::unordered_map<const char*, Matrix> held;
  std::list<const char*> order;  // the last used first
  std::deque<const char*> queue;
  std::vector<Mapping> mappings;
  std::vector<std::thread> readers;
  bool ended = false;

  explicit Shelf(size_t bytes) : capacity(bytes) {}

  ~Shelf() {
    {
      const std::lock_guard<std::mutex> guard(lock);
      ended = true;
    }
    changed.notify_all();
    for (std::thread& reader : readers) reader.join();
    for (auto& [data, matrix] : held) drop(matrix);
    for (const Mapping& mapping : mappings)
      if (mapping.file >= 0) close(mapping.file);
  }

  void drop(Matrix& matrix) {
    if (!matrix.memory) return;
    munmap(matrix.memory, matrix.room());
    used -= matrix.room();
    matrix.memory = nullptr;
  }

  const Mapping& mapping_of(const char* data) {
    const uintptr_t address = uintptr_t(data);
    for (const Mapping& known : mappings)
      if (address >= known.begin && address < known.end) return known;
    mappings.push_back(find_mapping(address));
    return mappings.back();
  }

  // Memory for a matrix, that of unused ones if need be.
  char* find_memory(size_t room) {
    while (used + room > capacity) {
      const auto oldest = std::find_if(order.rbegin(), order.rend(), [&](const char* name) {
        const Matrix& matrix = held.at(name);
        return matrix.users == 0 && matrix.state == State::here;
      });
      if (oldest == order.rend()) return nullptr;
      const auto victim = held.find(*oldest);
      char* const memory = victim->second.memory;
      const bool fits = memory && victim->second.room() == room;
      if (!fits) drop(victim->second);
      order.erase(std::next(oldest).base());
      held.erase(victim);
      if (fits) return memory;  // as much is used as before
    }
    void* const memory =
        mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return nullptr;
#ifdef MADV_HUGEPAGE
    madvise(memory, room, MADV_HUGEPAGE);
#endif
    used += room;
    return static_cast<char*>(memory);
  }

  void read() {
    std::unique_lock<std::mutex> guard(lock);
    while (true) {
      changed.wait(guard, [&] { return ended || !queue.empty(); });
      if (ended) return;
      Matrix& matrix = held.at(queue.front());
      queue.pop_front();
      matrix.state = State::reading;
      guard.unlock();  // elements of the map stay where they are, and this one has a user
      const bool whole = read_whole(matrix);
      guard.lock();
      matrix.state = whole ? State::here : State::failed;
      changed.notify_all();
    }
  }
};

ExpertBank::ExpertBank(int64_t bytes) : shelf_(new Shelf(size_t(std::max<int64_t>(bytes, 0)))) {
  for (int i = 0; i < kReaders; ++i) shelf_->readers.emplace_back([this] { shelf_->read(); });
}

ExpertBank::~ExpertBank() = default;

int64_t ExpertBank::room(size_t bytes) const {
  return int64_t(shelf_->capacity / (bytes + 4 * kSector));
}

void ExpertBank::want(const char* data, size_t bytes) {
  Shelf& shelf = *shelf_;
  {
    const std::lock_guard<std::mutex> guard(shelf.lock);
    const auto [at, added] = shelf.held.try_emplace(data);
    Matrix& matrix = at->second;
    ++matrix.users;
    if (!added) {
      shelf.order.splice(shelf.order.begin(), shelf.order, matrix.place);
      return;
    }
    matrix.data = data;
    matrix.bytes = bytes;
    matrix.from = shelf.mapping_of(data);
    const bool inside = uintptr_t(data) + bytes <= matrix.from.end;
    if (matrix.from.file >= 0 && inside) matrix.memory = shelf.find_memory(matrix.room());
    matrix.place = shelf.order.insert(shelf.order.begin(), data);
    if (!matrix.memory) {
      matrix.state = State::failed;
      return;
    }
    shelf.queue.push_back(data);
  }
  shelf.changed.notify_all();
}

const char* ExpertBank::take(const char* data) {
  Shelf& shelf = *shelf_;
  std::unique_lock<std::mutex> guard(shelf.lock);
  const Matrix& matrix = shelf.held.at(data);
  shelf.changed.wait(guard, [&] {
    return matrix.state == State::here || matrix.state == State::failed;
  });
  if (matrix.state == State::failed) return data;
  return matrix.memory + (matrix.first() - matrix.begin());
}

void ExpertBank::release(const char* data) {
  Shelf& shelf = *shelf_;
  const std::lock_guard<std::mutex> guard(shelf.lock);
  const auto at = shelf.held.find(data);
  if (--at->second.users > 0 || at->second.state != State::failed) return;
  shelf.drop(at->second);  // it may be read the next time
  shelf.order.erase(at->second.place);
  shelf.held.erase(at);
}

namespace {

std::mutex of_process;
std::shared_ptr<ExpertBank> bank;

}  // namespace

std::shared_ptr<ExpertBank> expert_bank() {
  const std::lock_guard<std::mutex> guard(of_process);
  return bank;
}

void keep_experts(int64_t bytes) {
  std::shared_ptr<ExpertBank> next = bytes > 0 ? std::make_shared<ExpertBank>(bytes) : nullptr;
  const std::lock_guard<std::mutex> guard(of_process);
  bank.swap(next);
}

}  // namespace edge_kv

void edge_kv_keep_experts(int64_t bytes) { edge_kv::keep_experts(bytes); }
