// For programs that ask one question: contenders with two threads, all in turns, beside one of them.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "cpu/parallel.h"

namespace onepass::bench {

constexpr std::size_t kThreads = 2;

struct Range {
  std::size_t begin, end;
};

// What a thread takes of `count`, in multiples of `granule` but for the last of all.
inline Range part_of(std::size_t count, std::size_t granule, std::size_t thread) {
  const std::size_t half = count / granule / kThreads * granule;
  return thread == 0 ? Range{0, half} : Range{half, count};
}

// Calls body(thread) on each of the threads.
inline void on_threads(const std::function<void(std::size_t)>& body) {
  parallel_for(
      kThreads, kThreads,
      [](void* context, std::size_t part) { (*static_cast<const std::function<void(std::size_t)>*>(context))(part); },
      const_cast<std::function<void(std::size_t)>*>(&body));
}

class Contest {
 public:
  void add(std::string name, std::function<void()> run) {
    contenders_.push_back({std::move(name), std::move(run), {}});
  }

  // Lets everybody run twice in each round, and prints medians in ms of the second time, and of its ratio to that of
  // `base`.
  void print(const std::string& title, const std::string& base, std::size_t rounds) {
    for (std::size_t round = 0; round < rounds; ++round) {
      for (Contender& contender : contenders_) {
        contender.run();
        const auto start = std::chrono::steady_clock::now();
        contender.run();
        contender.seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
      }
    }
    const auto found = std::ranges::find(contenders_, base, &Contender::name);
    if (found == contenders_.end()) {
      std::fprintf(stderr, "%s: nobody is called so\n", base.c_str());
      std::exit(1);
    }
    std::printf("%s\n", title.c_str());
    for (const Contender& contender : contenders_) {
      std::vector<double> ratios;
      for (std::size_t k = 0; k < rounds; ++k) ratios.push_back(contender.seconds[k] / found->seconds[k]);
      std::printf("  %-30s %8.3f  %5.2f\n", contender.name.c_str(), 1e3 * median(contender.seconds), median(ratios));
    }
  }

 private:
  struct Contender {
    std::string name;
    std::function<void()> run;
    std::vector<double> seconds;
  };

  static double median(std::vector<double> values) {
    std::ranges::sort(values);
    return values[values.size() / 2];
  }

  std::vector<Contender> contenders_;
};

// Returns whether --quick is given. Ends the process where anything else is, or where there is no AVX2.
inline bool read_arguments(int argc, char** argv) {
  const bool quick = argc > 1 && std::strcmp(argv[1], "--quick") == 0;
  if (argc > 2 || (argc == 2 && !quick)) {
    std::fprintf(stderr, "usage: %s [--quick]\n", argv[0]);
    std::exit(2);
  }
  if (!__builtin_cpu_supports("avx2")) {
    std::fprintf(stderr, "%s: this processor has no AVX2\n", argv[0]);
    std::exit(1);
  }
  return quick;
}

}  // namespace onepass::bench
