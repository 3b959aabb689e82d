// A small pool of threads. No OpenMP: a second OpenMP runtime beside the user's oversubscribes the machine, and libgomp
// hangs in a forked child.
#pragma once

#include <cstddef>

namespace onepass {

// The CPUs that this process may use: its affinity mask, asked anew at each call, capped by the cgroup's quota.
std::size_t usable_cpus();

// The number of threads that a large step uses: set_thread_count(), else usable_cpus(). 0 goes back to the default.
std::size_t thread_count();
void set_thread_count(std::size_t count);

// Reads the quota and makes forks known, which the first call that needs them does otherwise: a fork by another thread
// in the middle of that would leave the child waiting.
void prepare_threads();

// Calls body(context, part) once for each part in [0, parts), on the calling thread and up to threads - 1 workers, and
// returns when all calls have returned. A part goes to the same thread each time, unless that one is late. While
// another thread is inside parallel_for, and in a call from within a body, the calling thread does all parts itself.
// `body` must not throw.
void parallel_for(std::size_t threads, std::size_t parts, void (*body)(void* context, std::size_t part), void* context);

}  // namespace onepass
