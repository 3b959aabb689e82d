// Whose turn it is with an object that one thread uses at a time.
#pragma once

#include <atomic>
#include <cstdint>

namespace onepass {

// Taken and left by functions of C++, between which no interrupt is looked for. Who comes at a bad time gets an
// exception and never waits.
//
// A fork takes along turns of threads that the child does not have. One that had written nothing is over then; one that
// was writing has left half of something behind, and stays taken for ever.
class Turnstile {
 public:
  // `what`: what the object is called in messages; `busy`: the message for a turn that comes in the middle of another
  // one.
  constexpr Turnstile(const char* what, const char* busy) : what_(what), busy_(busy) {}
  ~Turnstile() = default;
  Turnstile(const Turnstile&) = delete;
  Turnstile& operator=(const Turnstile&) = delete;

  void take();    // throws std::runtime_error if the turn is another's
  void writes();  // from here on the turn's holder changes the object
  void leave() { holder_.store(0, std::memory_order_release); }

 private:
  const char* what_;
  const char* busy_;
  std::atomic<std::uint64_t> holder_{0};  // 0: nobody; else twice the thread's number, and 1 if it writes
};

// A turn for as long as this object lives.
class Turn {
 public:
  explicit Turn(Turnstile& turnstile) : turnstile_(turnstile) { turnstile_.take(); }
  ~Turn() { turnstile_.leave(); }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;
  void writes() const { turnstile_.writes(); }

 private:
  Turnstile& turnstile_;
};

// Before the first turn: makes forks known to this file.
void watch_forks();

}  // namespace onepass
