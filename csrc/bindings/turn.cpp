#include "bindings/turn.h"

#include <mutex>
#include <stdexcept>
#include <string>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace onepass {
namespace {

// Threads that have taken a turn have numbers, in the order of their first one; no number is given twice.
std::atomic<std::uint64_t> last_number{0};

std::uint64_t number_of_this_thread() {
  thread_local std::uint64_t number = 0;
  if (number == 0) number = last_number.fetch_add(1, std::memory_order_relaxed) + 1;
  return number;
}

// Of the last fork on the way to this process: all threads up to `forked_at` are gone, except the one that forked.
std::atomic<std::uint64_t> forked_at{0};
std::atomic<std::uint64_t> forked_by{0};

bool is_gone(std::uint64_t number) {
  return number <= forked_at.load(std::memory_order_relaxed) && number != forked_by.load(std::memory_order_relaxed);
}

}  // namespace

void watch_forks() {
#if defined(__unix__) || defined(__APPLE__)
  static std::once_flag once;
  std::call_once(once, [] {
    pthread_atfork(nullptr, nullptr, [] {
      forked_by.store(number_of_this_thread(), std::memory_order_relaxed);
      forked_at.store(last_number.load(std::memory_order_relaxed), std::memory_order_relaxed);
    });
  });
#endif
}

void Turnstile::take() {
  const std::uint64_t mine = 2 * number_of_this_thread();
  std::uint64_t holder = 0;
  while (!holder_.compare_exchange_strong(holder, mine, std::memory_order_acquire)) {
    if (holder == 0) continue;  // left just now
    if (!is_gone(holder / 2)) throw std::runtime_error(busy_);
    if (holder % 2 == 1) {
      throw std::runtime_error(std::string("another thread was in the middle of changing this ") + what_ +
                               " when this process was forked from its parent, so half of the change is here; make a "
                               "new " +
                               what_ + " from whole arrays. Nothing was done");
    }
    // Its holder will never leave: as if it had. If another thread is quicker, the loop finds it.
  }
}

void Turnstile::writes() { holder_.store(2 * number_of_this_thread() + 1, std::memory_order_relaxed); }

}  // namespace onepass
