// How kernels are called. A kernel gets a struct of its arguments, and every thread of a team calls it: it deals its work
// out by `deal` and `deal_rows`, at the end of which the threads wait for each other. Whether the team was made for one
// kernel or for all of a step (kernel.cpp) makes no difference to it, nor does the number of threads to the result.
#pragma once

#include <atomic>
#include <cstdint>

#include "vec.h"

#define SHOAL_KERNEL(name, Arguments) extern "C" __attribute__((visibility("default"))) void shoal_##name(const Arguments& a)

namespace shoal {

constexpr int kMaxLoops = 2;  // that a kernel deals out

// A thread's share of a loop: how many items are taken from its front and, in the upper half, from its end.
using Taken = std::atomic<uint64_t>;

// The team that runs, as one of its threads sees it.
struct Team {
  int self = 0, threads = 1;
  Taken* taken = nullptr;  // [threads, loops], 0 at first
  int64_t loops = 0, loop = 0;
};
extern thread_local Team team;

// Waits for all threads of the team.
void meet();

// Calls body(item) for each of the items [0, count) once, in some thread of the team, and returns when all are done. Each
// thread has a share of neighbours, from the front on. Who is through takes from the ends of the others' shares (work
// stealing: Blumofe and Leiserson, J. ACM 46, 1999): a thread whose core is taken by another program holds the team up for
// the item that it is at, and not for its whole share.
template <class Body>
void deal(int64_t count, Body body) {
  const int threads = team.threads;
  if (threads == 1) {
    for (int64_t item = 0; item < count; ++item) body(item);
    return;
  }
  constexpr uint64_t kFront = 1, kEnd = uint64_t{1} << 32;
  Taken* loop = team.taken + team.loop++;
  for (int i = 0; i < threads; ++i) {
    const int whose = (team.self + i) % threads;
    const int64_t first = count * whose / threads, end = count * (whose + 1) / threads;
    for (;;) {
      const uint64_t taken = loop[whose * team.loops].fetch_add(i == 0 ? kFront : kEnd, std::memory_order_relaxed);
      const int64_t from_front = (uint32_t)taken, from_end = taken >> 32;
      if (from_front + from_end >= end - first) break;
      body(i == 0 ? first + from_front : end - 1 - from_end);
    }
  }
  meet();
}

// The same for rows that take little time each: several neighbours at once.
template <class Body>
void deal_rows(int64_t rows, Body body) {
  const int64_t most = 4 * team.threads, pieces = rows < most ? rows : most;
  deal(pieces, [&](int64_t piece) {
    for (int64_t row = rows * piece / pieces; row < rows * (piece + 1) / pieces; ++row) body(row);
  });
}

}  // namespace shoal
