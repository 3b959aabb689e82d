// An instruction set that counts. Kernel units compiled with this header (ONEPASS_SIMD_HEADER) compute with one lane,
// as simd/scalar.h does, and tell counting.cpp of each value that is read from or written to memory, and of each
// operation.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/kernel.h"
#include "simd/one_lane.h"

namespace counting {

enum class Operation : std::uint8_t { add, multiply, divide, root, other };  // a subtraction is an addition

void note_read(const void* from, std::size_t bytes);
void note_write(const void* to, std::size_t bytes);
void note(Operation operation);

}  // namespace counting

namespace onepass {
namespace {

constexpr Isa kIsa = Isa::scalar;

// Random bits, and the integers of which they are made. What is done with integers is not counted.
struct CountingInteger {
  OneInteger value;

  HD explicit CountingInteger(std::uint32_t x) : value(x) {}
  HD explicit CountingInteger(OneInteger x) : value(x) {}
  HD static CountingInteger load(const std::uint32_t* from) {
    counting::note_read(from, sizeof *from);
    return CountingInteger(OneInteger::load(from));
  }
  HD void store(std::uint32_t* to) const {
    counting::note_write(to, sizeof *to);
    value.store(to);
  }

  HD friend CountingInteger operator+(CountingInteger a, CountingInteger b) {
    return CountingInteger(a.value + b.value);
  }
  HD friend CountingInteger operator-(CountingInteger a, CountingInteger b) {
    return CountingInteger(a.value - b.value);
  }
  HD friend CountingInteger operator&(CountingInteger a, CountingInteger b) {
    return CountingInteger(a.value & b.value);
  }
  HD friend CountingInteger operator^(CountingInteger a, CountingInteger b) {
    return CountingInteger(a.value ^ b.value);
  }
  HD friend CountingInteger operator<<(CountingInteger a, int n) { return CountingInteger(a.value << n); }
  HD friend CountingInteger operator>>(CountingInteger a, int n) { return CountingInteger(a.value >> n); }
  HD friend CountingInteger product16(CountingInteger a, std::uint32_t x) {
    return CountingInteger(product16(a.value, x));
  }
  HD friend CountingInteger shift_right(CountingInteger a, int n) { return CountingInteger(shift_right(a.value, n)); }
};

// A lane of Philox whose parts become such integers.
struct CountingWord : OneWord {
  CountingWord() = default;
  HD explicit CountingWord(std::uint64_t x) : OneWord(x) {}
  HD explicit CountingWord(OneWord x) : OneWord(x) {}
  HD static CountingWord counting(std::uint64_t start) { return CountingWord(start); }
  HD friend CountingWord operator^(CountingWord a, CountingWord b) { return CountingWord(OneWord(a) ^ OneWord(b)); }
  HD friend CountingWord multiply(CountingWord a, std::uint32_t x) { return CountingWord(multiply(OneWord(a), x)); }
  HD friend CountingWord upper(CountingWord a) { return CountingWord(upper(OneWord(a))); }
  HD static CountingInteger merge(const CountingWord (&part)[parts]) {
    return CountingInteger(OneWord::merge({part[0]}));
  }
};

template <class S>
struct CountingLane {
  using Scalar = S;
  using Integers = CountingInteger;
  using Lane = OneLane<S>;
  using Operation = counting::Operation;
  static constexpr std::size_t lanes = 1;
  Lane lane;

  CountingLane() = default;
  HD explicit CountingLane(S x) : lane(x) {}
  HD explicit CountingLane(Lane x) : lane(x) {}

  template <class D>
  HD static CountingLane load(const std::byte* from) {
    counting::note_read(from, sizeof(typename D::Storage));
    return CountingLane(Lane::template load<D>(from));
  }
  template <class D>
  HD void store(std::byte* to) const {
    counting::note_write(to, sizeof(typename D::Storage));
    lane.template store<D>(to);
  }
  template <class D>
  HD CountingLane round() const {
    return CountingLane(lane.template round<D>());
  }
  template <class D>
  HD CountingLane round(CountingInteger random) const {
    return CountingLane(lane.template round<D>(random.value));
  }
  template <class D>
  HD void store_nearest(std::byte* to) const {
    store<D>(to);
  }
  template <class D>
  HD static CountingLane load_part(const std::byte* from, std::size_t /*count*/) {
    return load<D>(from);
  }
  template <class D>
  HD void store_part(std::byte* to, std::size_t /*count*/) const {
    store<D>(to);
  }
  template <class D>
  HD void store_nearest_part(std::byte* to, std::size_t /*count*/) const {
    store<D>(to);
  }
  HD static CountingLane join(const std::byte* high, const std::byte* low) {
    counting::note_read(high, sizeof Split::high);
    counting::note_read(low, sizeof Split::low);
    return CountingLane(Lane::join(high, low));
  }
  HD static CountingLane join_part(const std::byte* high, const std::byte* low, std::size_t /*count*/) {
    return join(high, low);
  }
  HD void split(std::byte* high, std::byte* low) const {
    counting::note_write(high, sizeof Split::high);
    counting::note_write(low, sizeof Split::low);
    lane.split(high, low);
  }
  HD void split_part(std::byte* high, std::byte* low, std::size_t /*count*/) const { split(high, low); }
  template <class D>
  HD void stream(std::byte* to) const {
    store<D>(to);
  }
  HD static void fence() {}
  HD friend CountingLane first(std::size_t /*count*/, CountingLane a, CountingLane /*b*/) { return a; }

  HD friend CountingLane operator+(CountingLane a, CountingLane b) { return noted(Operation::add, a.lane + b.lane); }
  HD friend CountingLane operator-(CountingLane a, CountingLane b) { return noted(Operation::add, a.lane - b.lane); }
  HD friend CountingLane operator*(CountingLane a, CountingLane b) {
    return noted(Operation::multiply, a.lane * b.lane);
  }
  HD friend CountingLane operator/(CountingLane a, CountingLane b) { return noted(Operation::divide, a.lane / b.lane); }
  HD friend CountingLane sqrt(CountingLane a) { return noted(Operation::root, sqrt(a.lane)); }
  HD friend CountingLane max(CountingLane a, CountingLane b) { return noted(Operation::other, max(a.lane, b.lane)); }
  HD friend CountingLane min(CountingLane a, CountingLane b) { return noted(Operation::other, min(a.lane, b.lane)); }
  HD friend CountingLane flush(CountingLane a) { return noted(Operation::other, flush(a.lane)); }
  HD friend CountingLane gate(CountingLane a, CountingLane y) { return noted(Operation::other, gate(a.lane, y.lane)); }
  HD friend CountingLane sign(CountingLane a) { return noted(Operation::other, sign(a.lane)); }

 private:
  HD static CountingLane noted(Operation operation, Lane result) {
    counting::note(operation);
    return CountingLane(result);
  }
};

HD CountingInteger bits_of(CountingLane<float> a) { return CountingInteger(bits_of(a.lane)); }
HD CountingLane<float> float_of(CountingInteger a) { return CountingLane<float>(float_of(a.value)); }
HD CountingLane<float> to_float(CountingInteger a) { return CountingLane<float>(to_float(a.value)); }

template <class S>
using Wide = CountingLane<S>;
using WideWords = CountingWord;

}  // namespace
}  // namespace onepass
