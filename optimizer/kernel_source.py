"""The parts of a kernel's C++ that are the same for all."""

AXES = 6  # at most so many axes are taken apart

COMMON = f"""
constexpr int AXES = {AXES};
""" + """
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <cstdint>
#include <limits>
#include <memory>
#include <type_traits>
using at::vec::Vectorized;

template <typename S>
struct Argument {
  S* data;
  int64_t step;        // from one step to the next
  int64_t pitch;       // from one inner element to the next
  int64_t strides[AXES];  // along the axes that are taken apart, the block's last
};

template <typename S, bool whole>
inline Vectorized<S> load(const S* p, int64_t n) {
  if constexpr (whole) return Vectorized<S>::loadu(p);
  return Vectorized<S>::loadu(p, n);
}

template <typename S, bool whole>
inline void store(const Vectorized<S>& v, S* p, int64_t n) {
  if constexpr (whole) v.store(p);
  else v.store(p, n);
}

template <typename S>
inline Vectorized<S> gather(const S* p, int64_t stride, int64_t n) {
  alignas(64) S held[Vectorized<S>::size()] = {};
  for (int64_t i = 0; i < n; ++i) held[i] = p[i * stride];
  return Vectorized<S>::loadu(held);
}

template <typename S>
inline void scatter(const Vectorized<S>& v, S* p, int64_t stride, int64_t n) {
  alignas(64) S held[Vectorized<S>::size()];
  v.store(held);
  for (int64_t i = 0; i < n; ++i) p[i * stride] = held[i];
}

template <typename S, typename F>
inline S across(const Vectorized<S>& v, F combine) {
  using V = Vectorized<S>;
  return at::vec::vec_reduce_all<S>([&](V& x, V& y) { return combine(x, y); }, v);
}

// how many blocks there are, and where the arguments of one begin
inline int64_t tasks(const int64_t* sizes, int64_t blocks) {
  for (int axis = 0; axis < AXES - 1; ++axis) blocks *= sizes[axis];
  return blocks;
}

template <typename S>
inline void begin(const Argument<S>* a, int count, const int64_t* sizes, int64_t outer,
                  int64_t* at) {
  for (int k = 0; k < count; ++k) at[k] = 0;
  for (int axis = AXES - 2; axis >= 0; --axis) {
    const int64_t index = outer % sizes[axis];
    outer /= sizes[axis];
    for (int k = 0; k < count; ++k) at[k] += index * a[k].strides[axis];
  }
}

// body(whole, first, count) for each vector of `size` elements
template <typename S, int64_t size, typename F>
inline void sweep(F body) {
  constexpr int64_t W = Vectorized<S>::size();
  for (int64_t j = 0; j + W <= size; j += W) body(std::true_type{}, j, W);
  if constexpr (size % W) body(std::false_type{}, size / W * W, size % W);
}

// out[r, m, n] = Σ_k a[r, m, k] · b[r, k, n], contiguous; `shared`: b is the same for all rows
template <typename S, int R, bool shared, int64_t B, int64_t M, int64_t N, int64_t K, int64_t AB,
          int64_t AM, int64_t AK, int64_t BB, int64_t BK, int64_t BN>
inline void product(S* out, const S* a, int64_t ar, const S* b, int64_t br) {
  using V = Vectorized<S>;
  constexpr int64_t W = V::size(), J = 4;
  for (int64_t i = 0; i < B * M; ++i) {
    const S* x = a + i / M * AB + i % M * AM;
    const S* y = b + i / M * BB;
    S* o = out + i * N;
    const int64_t orow = B * M * N;
    if constexpr (BN == 1) {
      const auto tile = [&](auto vectors, auto whole, int64_t j, int64_t n) {
        constexpr int C = decltype(vectors)::value;
        constexpr bool full = decltype(whole)::value;
        V sums[R][C];
        for (int r = 0; r < R; ++r)
          for (int c = 0; c < C; ++c) sums[r][c] = V(S(0));
        for (int64_t k = 0; k < K; ++k) {
          const S* row = y + k * BK + j;
          V read[C];
          if constexpr (shared)
            for (int c = 0; c < C; ++c) read[c] = load<S, full>(row + c * W, n);
          for (int r = 0; r < R; ++r) {
            const V scale(x[r * ar + k * AK]);
            if constexpr (!shared)
              for (int c = 0; c < C; ++c) read[c] = load<S, full>(row + r * br + c * W, n);
            for (int c = 0; c < C; ++c) sums[r][c] = at::vec::fmadd(scale, read[c], sums[r][c]);
          }
        }
        for (int r = 0; r < R; ++r)
          for (int c = 0; c < C; ++c)
            store<S, full>(sums[r][c], o + r * orow + j + c * W, n);
      };
      int64_t j = 0;
      for (; j + J * W <= N; j += J * W)
        tile(std::integral_constant<int, J>{}, std::true_type{}, j, W);
      for (; j + W <= N; j += W) tile(std::integral_constant<int, 1>{}, std::true_type{}, j, W);
      if (j < N) tile(std::integral_constant<int, 1>{}, std::false_type{}, j, N - j);
    } else if constexpr (BK == 1 && AK == 1) {
      for (int r = 0; r < R; ++r)
        for (int64_t n = 0; n < N; ++n) {
          V sum(S(0));
          sweep<S, K>([&](auto whole, int64_t k, int64_t count) {
            constexpr bool full = decltype(whole)::value;
            sum = at::vec::fmadd(load<S, full>(x + r * ar + k, count),
                                 load<S, full>(y + r * br + n * BN + k, count), sum);
          });
          o[r * orow + n] = across(sum, [](V u, V v) { return u + v; });
        }
    } else {
      for (int r = 0; r < R; ++r)
        for (int64_t n = 0; n < N; ++n) {
          S sum(0);
          for (int64_t k = 0; k < K; ++k)
            sum += x[r * ar + k * AK] * y[r * br + k * BK + n * BN];
          o[r * orow + n] = sum;
        }
    }
  }
}
"""

LANES = """
template <typename S>
void run(const int64_t* packed, const int64_t* sizes, int64_t steps, int64_t threads) {
  const auto* a = reinterpret_cast<const Argument<S>*>(packed);
  constexpr int64_t W = Vectorized<S>::size();
  constexpr int64_t N = EXPECTED >= 4 * W ? 4 : EXPECTED >= 2 * W ? 2 : 1;
  const int64_t size = sizes[AXES - 1], blocks = (size + N * W - 1) / (N * W);
  const int64_t all = tasks(sizes, blocks);
#pragma omp parallel for num_threads(threads) if (threads > 1 && all > 1)
  for (int64_t number = 0; number < all; ++number) {
    const int64_t lane = number % blocks * N * W, left = size - lane;
    int64_t at[COUNT];
    begin(a, COUNT, sizes, number / blocks, at);
    if (left >= N * W) {
      walk<S, N, true>(a, at, steps, lane, W);
    } else {
      int64_t done = 0;
      for (; done + W <= left; done += W) walk<S, 1, true>(a, at, steps, lane + done, W);
      if (done < left) walk<S, 1, false>(a, at, steps, lane + done, left - done);
    }
  }
}
"""

ROWS = """
template <typename S>
void run(const int64_t* packed, const int64_t* sizes, int64_t steps, int64_t threads) {
  const auto* a = reinterpret_cast<const Argument<S>*>(packed);
  constexpr int64_t R = EXPECTED >= 8 ? 4 : EXPECTED >= 4 ? 2 : 1;
  const int64_t size = sizes[AXES - 1], blocks = (size + R - 1) / R, all = tasks(sizes, blocks);
#pragma omp parallel for num_threads(threads) if (threads > 1 && all > 1)
  for (int64_t number = 0; number < all; ++number) {
    const int64_t row = number % blocks * R;
    int64_t at[COUNT];
    begin(a, COUNT, sizes, number / blocks, at);
    for (int k = 0; k < COUNT; ++k) at[k] += row * a[k].strides[AXES - 1];
    if (size - row >= R) {
      walk<S, R>(a, at, steps);
    } else {
      for (int64_t one = row; one < size; ++one) {
        walk<S, 1>(a, at, steps);
        for (int k = 0; k < COUNT; ++k) at[k] += a[k].strides[AXES - 1];
      }
    }
  }
}
"""

ENTRIES = """
extern "C" void run_float(const int64_t* a, const int64_t* s, int64_t steps, int64_t threads) {
  run<float>(a, s, steps, threads);
}
extern "C" void run_double(const int64_t* a, const int64_t* s, int64_t steps, int64_t threads) {
  run<double>(a, s, steps, threads);
}
"""
