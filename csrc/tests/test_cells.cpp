// Every cell's backward against central differences of its forward, in double.
#include "check.h"
#include "rnnkern_cells.h"
#include "rnnkern_lists.h"

using namespace rnnkern_test;

template <class Cell>
void check_cell(const char* name) {
  constexpr int G = Cell::kGates, S = Cell::kStates, kInputs = 2 * G + S;
  const std::vector<double> start = random_vector<double>(kInputs, 7), weight = random_vector<double>(S, 8);
  const auto loss = [&](const std::vector<double>& v, double (&saved)[Cell::kSaved]) {
    double gx[G], gh[G], state[S], next[S], sum = 0;
    for (int g = 0; g < G; ++g) gx[g] = v[g], gh[g] = v[G + g];
    for (int s = 0; s < S; ++s) state[s] = v[2 * G + s];
    Cell::forward(gx, gh, state, next, saved);
    for (int s = 0; s < S; ++s) sum += weight[s] * next[s];
    return sum;
  };
  double saved[Cell::kSaved], unused[Cell::kSaved], state[S], dnext[S], dgx[G], dgh[G], dstate[S];
  loss(start, saved);
  for (int s = 0; s < S; ++s) state[s] = start[2 * G + s], dnext[s] = weight[s];
  Cell::backward(saved, state, dnext, dgx, dgh, dstate);
  for (int i = 0; i < kInputs; ++i) {
    constexpr double kStep = 1e-6;
    std::vector<double> above = start, below = start;
    above[i] += kStep;
    below[i] -= kStep;
    const double expected = (loss(above, unused) - loss(below, unused)) / (2 * kStep);
    const double actual = i < G ? dgx[i] : i < 2 * G ? dgh[i - G] : dstate[i - 2 * G];
    CHECK(std::abs(actual - expected) < 1e-9, "%s: gradient %d is %.12g, differences give %.12g", name, i, actual,
          expected);
  }
  for (int g = 0; g < G - Cell::kSplitGates; ++g) CHECK(dgx[g] == dgh[g], "%s: gate %d is not split", name, g);
}

int main() {
  return run_tests([] {
#define RNNKERN_CHECK_CELL(cell, Struct) check_cell<rnnkern::Struct>(#cell);
    RNNKERN_FOR_EACH_CELL(RNNKERN_CHECK_CELL)
  });
}
