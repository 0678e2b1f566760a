// What a decode step does between its matrix products, in fp32 on a CPU: norms, rotation, paged attention, gating.
//
// Compiled at load by native.py and called through plain pointers: no torch headers, no C++ runtime. Sizes are in floats
// unless named otherwise. Knows nothing of sequences: rows, tables and lengths come with each call.
// Method: PagedAttention (Kwon et al. 2023) with the online softmax of Milakov and Gimelshein (2018); exp after Cephes.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int LANES = 16;
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef float half __attribute__((vector_size(2 * LANES)));
typedef float quarter __attribute__((vector_size(LANES)));

template <class V> inline V load(const void *from) {
  V x;
  memcpy(&x, from, sizeof x);
  return x;
}
inline void store(float *to, vec x) { memcpy(to, &x, sizeof x); }
inline vec splat(float x) { return vec{} + x; }

inline float sum(vec x) {
  const char *raw = reinterpret_cast<const char *>(&x);
  const half a = load<half>(raw) + load<half>(raw + sizeof(half));
  raw = reinterpret_cast<const char *>(&a);
  const quarter b = load<quarter>(raw) + load<quarter>(raw + sizeof(quarter));
  return (b[0] + b[2]) + (b[1] + b[3]);
}

inline float highest(vec x) {
  const char *raw = reinterpret_cast<const char *>(&x);
  half a = load<half>(raw), b = load<half>(raw + sizeof(half));
  a = a > b ? a : b;
  raw = reinterpret_cast<const char *>(&a);
  quarter c = load<quarter>(raw), d = load<quarter>(raw + sizeof(quarter));
  c = c > d ? c : d;
  const float e = c[0] > c[2] ? c[0] : c[2], f = c[1] > c[3] ? c[1] : c[3];
  return e > f ? e : f;
}

// Arguments are at most 88 here; below -87 the result is as good as zero. A nan stays a nan.
inline vec exponential(vec x) {
  x = x < -87.0f ? splat(-87.0f) : x;
  const vec rounder = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves no fraction
  vec n = x * 1.44269504f + rounder;
  n = n - rounder;
  const vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const ints power = (__builtin_convertvector(n, ints) + 127) << 23;
  return p * load<vec>(&power);
}

struct Pages {  // one KV head of one sequence
  const float *keys, *values;
  const int32_t *table;
  long token;  // from one token to the next
  int block_tokens, first, last;
  float scale, softcap;
};

// M query vectors of W * LANES numbers that share keys and values, over tokens first to last.
template <int M, int W> void attend_head(const float *q, float *out, const Pages &p) {
  vec query[M][W], acc[M][W];
  float top[M], mass[M];
  for (int g = 0; g < M; g++) {
    top[g] = -INFINITY, mass[g] = 0;
    for (int d = 0; d < W; d++) acc[g][d] = vec{}, query[g][d] = load<vec>(q + (g * W + d) * LANES) * p.scale;
  }
  for (int from = p.first, n; from < p.last; from += n) {
    const int at = from % p.block_tokens;
    n = LANES;
    if (n > p.block_tokens - at) n = p.block_tokens - at;
    if (n > p.last - from) n = p.last - from;
    const long here = ((long)p.table[from / p.block_tokens] * p.block_tokens + at) * p.token;
    const float *k = p.keys + here, *v = p.values + here;
    // the next portion is fetched line by line while this one is worked on: a burst would fill the queue and stall
    const int then = from + n < p.last ? from + n : from;
    const long next = ((long)p.table[then / p.block_tokens] * p.block_tokens + then % p.block_tokens) * p.token;

    float scores[M][LANES];
    for (int g = 0; g < M; g++) store(scores[g], splat(-INFINITY));
    for (int t = 0; t < n; t++) {
      vec part[M];
      for (int g = 0; g < M; g++) part[g] = vec{};
      for (int d = 0; d < W; d++) {
        __builtin_prefetch(p.keys + next + t * p.token + d * LANES);
        const vec key = load<vec>(k + t * p.token + d * LANES);
        for (int g = 0; g < M; g++) part[g] += query[g][d] * key;
      }
      for (int g = 0; g < M; g++) scores[g][t] = sum(part[g]);
    }
    for (int g = 0; g < M; g++) {
      if (p.softcap > 0)
        for (int t = 0; t < n; t++) scores[g][t] = p.softcap * tanhf(scores[g][t] / p.softcap);
      const vec x = load<vec>(scores[g]);
      const float high = highest(x);
      if (!(high <= top[g])) {
        const float shrink = exponential(splat(top[g] - high))[0];
        mass[g] *= shrink;
        for (int d = 0; d < W; d++) acc[g][d] *= shrink;
        top[g] = high;
      }
      const vec e = exponential(x - top[g]);
      mass[g] += sum(e);
      store(scores[g], e);
    }
    for (int t = 0; t < n; t++)
      for (int d = 0; d < W; d++) {
        __builtin_prefetch(p.values + next + t * p.token + d * LANES);
        const vec value = load<vec>(v + t * p.token + d * LANES);
        for (int g = 0; g < M; g++) acc[g][d] += scores[g][t] * value;
      }
  }
  for (int g = 0; g < M; g++)
    for (int d = 0; d < W; d++) store(out + (g * W + d) * LANES, acc[g][d] / mass[g]);
}

// As many of a group's query vectors at a time as fit the registers.
template <int W> void attend_group(const float *q, float *out, int group, const Pages &p) {
  constexpr int most = W <= 4 ? 4 : W <= 8 ? 3 : 1;
  while (group > 0) {
    int m = group < most ? group : most;
    if (most >= 4 && m == 4) attend_head<most >= 4 ? 4 : 1, W>(q, out, p);
    else if (most >= 3 && m == 3) attend_head<most >= 3 ? 3 : 1, W>(q, out, p);
    else if (most >= 3 && m == 2) attend_head<most >= 3 ? 2 : 1, W>(q, out, p);
    else m = 1, attend_head<1, W>(q, out, p);
    q += m * W * LANES, out += m * W * LANES, group -= m;
  }
}

inline float root_mean_square(const float *x, long n, float eps) {
  float total = 0;
#pragma omp simd reduction(+ : total)
  for (long i = 0; i < n; i++) total += x[i] * x[i];
  return 1.0f / sqrtf(total / n + eps);
}

inline void rotate(float *x, const float *cosine, const float *sine, int dim) {
  const int half_dim = dim / 2;
#pragma omp simd
  for (int d = 0; d < half_dim; d++) {
    const float a = x[d], b = x[d + half_dim];
    x[d] = a * cosine[d] - b * sine[d];
    x[d + half_dim] = b * cosine[d + half_dim] + a * sine[d + half_dim];
  }
}

}  // namespace

extern "C" {

// Attention of n rows, each a query token over tokens [last - window, last) of its own table; 0 = no window, no soft-cap.
// Query of head h of row r at q[r * q_row + h * q_head]; out is [rows, heads, dim]; pages [block, token, head, dim].
// tables[i] is where row i's table begins in table. Returns 1 for a head size that it was not made for.
int attend(const float *q, long q_row, long q_head, float *out, const float *keys, const float *values,
           const int32_t *last, const int64_t *tables, const int32_t *table, long n, int block_tokens, int kv_heads,
           int group, int dim, int window, float scale, float softcap, int threads) {
  if (dim % LANES || dim > 256 || group * dim > 8192) return 1;
  const int width = dim / LANES;
  if (width != 1 && width != 2 && width != 4 && width != 5 && width != 6 && width != 8 && width != 16) return 1;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
  for (long i = 0; i < n * kv_heads; i++) {
    const long r = i / kv_heads, h = i % kv_heads;
    float query[8192];
    for (int g = 0; g < group; g++)
      memcpy(query + g * dim, q + r * q_row + (h * group + g) * q_head, dim * sizeof(float));
    float *to = out + (r * kv_heads + h) * group * dim;
    const int first = window > 0 && last[r] > window ? last[r] - window : 0;
    const Pages p{keys + h * dim,  values + h * dim, table + tables[r], (long)kv_heads * dim, block_tokens,
                  first,           last[r],          scale,             softcap};
    switch (width) {
      case 1: attend_group<1>(query, to, group, p); break;
      case 2: attend_group<2>(query, to, group, p); break;
      case 4: attend_group<4>(query, to, group, p); break;
      case 5: attend_group<5>(query, to, group, p); break;
      case 6: attend_group<6>(query, to, group, p); break;
      case 8: attend_group<8>(query, to, group, p); break;
      default: attend_group<16>(query, to, group, p);
    }
  }
  return 0;
}

// x += delta (where there is one), out = norm(x) * weight; all [rows, n].
void add_norm(float *x, const float *delta, const float *weight, float *out, long rows, long n, float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (long r = 0; r < rows; r++) {
    float *xs = x + r * n, *to = out + r * n;
    if (delta) {
      const float *more = delta + r * n;
#pragma omp simd
      for (long i = 0; i < n; i++) xs[i] += more[i];
    }
    const float factor = root_mean_square(xs, n, eps);
#pragma omp simd
    for (long i = 0; i < n; i++) to[i] = xs[i] * factor * weight[i];
  }
}

// Rows of query, key and value heads side by side: norms of single heads (Qwen3) and rotation where there are any,
// in place for queries; keys and values go to their slots in the pages. cosine, sine [rows, dim] or null.
void write_kv(float *qkv, float *keys, float *values, const int64_t *slots, const float *cosine, const float *sine,
              const float *q_norm, const float *k_norm, float eps, long rows, int heads, int kv_heads, int dim, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (long r = 0; r < rows; r++) {
    float *row = qkv + r * (heads + 2L * kv_heads) * dim;
    for (int h = 0; h < heads + kv_heads; h++) {
      float *x = row + (long)h * dim;
      const float *norm = h < heads ? q_norm : k_norm;
      if (norm) {
        const float factor = root_mean_square(x, dim, eps);
#pragma omp simd
        for (int d = 0; d < dim; d++) x[d] = x[d] * factor * norm[d];
      }
      if (cosine) rotate(x, cosine + r * dim, sine + r * dim, dim);
    }
    const long size = (long)kv_heads * dim;
    memcpy(keys + slots[r] * size, row + (long)heads * dim, size * sizeof(float));
    memcpy(values + slots[r] * size, row + (long)(heads + kv_heads) * dim, size * sizeof(float));
  }
}

// out[r] = silu(both[r][:n]) * both[r][n:]; n is a multiple of LANES.
void gate(const float *both, float *out, long rows, long n, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (long r = 0; r < rows; r++) {
    const float *x = both + r * 2 * n, *up = x + n;
    for (long i = 0; i < n; i += LANES) {
      const vec a = load<vec>(x + i);
      const vec negative = -a > 88.0f ? splat(88.0f) : -a;
      store(out + r * n + i, a / (exponential(negative) + 1.0f) * load<vec>(up + i));
    }
  }
}

}  // extern "C"
