// Running without the interpreter lock.
#pragma once

#include <pybind11/pybind11.h>

#include <chrono>
#include <cstddef>
#include <thread>

#if defined(__GLIBCXX__)
#include <cxxabi.h>
#endif

namespace onepass {

// The smallest work, in bytes of traffic, for which the interpreter lock is released: below it, giving the lock back
// costs more than the work.
inline constexpr std::size_t kReleaseBytes = std::size_t{1} << 15;

// Takes the interpreter lock back. Before CPython 3.14 that ends the thread, by unwinding it, when the interpreter has
// been shut down meanwhile (a daemon thread). What lies above us does not survive that: the thread waits instead, like
// in later versions, until the process is gone.
// (That unwinding hands over no object, which GCC's own sanitizer takes for a mistake.)
[[gnu::noinline, gnu::no_sanitize("undefined")]] inline void restore_thread(PyThreadState* state) {
#if defined(__GLIBCXX__)
  try {
    PyEval_RestoreThread(state);
  } catch (abi::__forced_unwind&) {
    for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
  }
#else
  PyEval_RestoreThread(state);
#endif
}

// The result of action(), during which other Python threads run.
template <class Action>
auto without_interpreter_lock(Action action) {
  PyThreadState* const state = PyEval_SaveThread();
  try {
    const auto result = action();
    restore_thread(state);
    return result;
  } catch (...) {  // no memory
    restore_thread(state);
    throw;
  }
}

}  // namespace onepass
