// One loaded .pte: its methods over one state arena. A C interface for ctypes, JNI and C++.
//
// Functions that can fail return 0 or fill `error` with one line and return non-zero.
#pragma once

#include <stdint.h>

#if defined(__cplusplus)
extern "C" {
#endif

#define EDGE_KV_API __attribute__((visibility("default")))

typedef struct edge_kv_engine edge_kv_engine;

// Load `program` (a .pte) with its weights in the file `weights`, or inside of it where that is "".
// `threads` are the engine's own, except for what is delegated to XNNPACK: that runs on threads of
// the process, whose number must not change while such an engine is open. With `exact`, products
// are of float activations. Null on failure.
EDGE_KV_API edge_kv_engine* edge_kv_open(const char* program, const char* weights, int threads,
                                         int exact, char* error, int error_bytes);
EDGE_KV_API void edge_kv_close(edge_kv_engine*);

// Inputs, outputs and state of the loaded methods as the program has them, one a line with its method,
// what it is, type and sizes, the largest where they vary: "prefill input int64 128". Returns the
// bytes of that text, of which at most `bytes` are written.
EDGE_KV_API int64_t edge_kv_describe(edge_kv_engine*, char* text, int64_t bytes);

// A state buffer by its name in the program and its bytes, zeroed, its pages exist once they are
// written; null if there is none.
EDGE_KV_API void* edge_kv_buffer(edge_kv_engine*, const char* name, int64_t* bytes);

// An integer that the exporter stored beside the methods, or `otherwise`: "edge_kv_weights", the
// bytes of the weight file; "edge_kv_ctx", the most positions; "edge_kv_ple_bits" and
// "edge_kv_ple_block" of the file of per-layer rows (edge_kv/manifest.py). All else is in the text
// of `edge_kv_describe`.
EDGE_KV_API int64_t edge_kv_fact(edge_kv_engine*, const char* name, int64_t otherwise);

// Write the state of `count` tokens from position `pos`; ple is [count, layers, dim] or null.
EDGE_KV_API int edge_kv_prefill(edge_kv_engine*, const int64_t* ids, int64_t count, int64_t pos,
                                const float* ple, char* error, int error_bytes);

// `count` tokens from position `pos`, as many as the program takes; fills logits [count, vocab].
EDGE_KV_API int edge_kv_decode(edge_kv_engine*, const int64_t* ids, int64_t count, int64_t pos,
                               const float* ple, float* logits, int64_t vocab, char* error,
                               int error_bytes);

// Get ready to draft with a program that has a method `draft`, which reads the state buffers
// `tables`, names one a line in the order of its inputs. To be called once, before it is described.
EDGE_KV_API int edge_kv_load_draft(edge_kv_engine*, const char* tables, char* error,
                                   int error_bytes);

// The hidden states [count, width] of the tokens that decode took last.
EDGE_KV_API int edge_kv_hidden(edge_kv_engine*, float* hidden, int64_t values, char* error,
                               int error_bytes);

// What may follow the token `id` in a burst of drafts from position `pos`, which writes no state:
// from hidden [width] fills logits [scored] and carry [width], and tokens [scored] unless null.
EDGE_KV_API int edge_kv_draft(edge_kv_engine*, int64_t id, int64_t pos, const float* hidden,
                              float* carry, int64_t width, float* logits, int64_t* tokens,
                              int64_t scored, char* error, int error_bytes);

// The instruction set the kernels use, a name as EDGE_KV_ISA takes it (kernels.h).
EDGE_KV_API const char* edge_kv_isa(void);

#if defined(__cplusplus)
}
#endif
