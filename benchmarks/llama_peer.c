// One llama.cpp measurement: prefill and decode at real depths, memory of the process, JSON a line.
//   llama_peer model=F ctx=32768 fa=1 kv=f16 repack=1 lazy=1 nout=16 threads=2 depths=0,4096 pp=512
//              tg=32 reps=3 [snapshots=DIR]
// A depth is reached by really running the prompt, once: with snapshots=DIR the state is kept in a
// file (named after depth, fa and kv) and restored from there by later runs; a deeper one starts
// from the deepest that is there. Built against llama.cpp (README.md beside this file says how).
#include "llama.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static int n_args; static char **args;
static const char *arg(const char *key, const char *otherwise) {
    size_t n = strlen(key);
    for (int i = 1; i < n_args; i++) if (!strncmp(args[i], key, n) && args[i][n] == '=') return args[i] + n + 1;
    return otherwise;
}
static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + 1e-9 * t.tv_nsec; }
static void die(const char *what) { fprintf(stderr, "llama_peer: %s\n", what); exit(1); }
static void quiet(enum ggml_log_level level, const char *text, void *p) { (void)p; if (level >= GGML_LOG_LEVEL_ERROR) fputs(text, stderr); }
static long status(const char *field) {  // KiB, from /proc/self/status
    char line[256]; long kib = -1; size_t n = strlen(field); FILE *f = fopen("/proc/self/status", "r");
    while (fgets(line, sizeof line, f)) if (!strncmp(line, field, n) && line[n] == ':') kib = atol(line + n + 1);
    fclose(f); return kib;
}
static void memory(void) {
    printf("\"rss_anon_mib\": %ld, \"rss_file_mib\": %ld, \"vm_hwm_mib\": %ld}\n", status("RssAnon") >> 10, status("RssFile") >> 10, status("VmHWM") >> 10);
    fflush(stdout);
}
static struct llama_context *ctx; static llama_token *ids; static int n_ids;
static void feed(int from, int n, int step) {
    for (int i = 0; i < n; i += step) {
        int take = n - i < step ? n - i : step;
        if (llama_decode(ctx, llama_batch_get_one(ids + from + i, take))) die("llama_decode failed");
    }
    llama_synchronize(ctx);
}
static void go_to(int depth, const char *dir, const char *name) {
    static unsigned char *state; static size_t state_size; static int state_depth = -1;
    char path[4096]; size_t count;
    llama_memory_clear(llama_get_memory(ctx), false);
    if (!depth) return;
    snprintf(path, sizeof path, "%s/%s-%d.state", dir ? dir : "", name, depth);
    if (dir && !access(path, R_OK)) {
        if (!llama_state_seq_load_file(ctx, path, 0, ids, n_ids, &count) || (int)count != depth) die("bad snapshot");
        return;
    }
    if (state_depth == depth) { llama_state_seq_set_data(ctx, state, state_size, 0); return; }
    int base = 0;
    for (int d = depth - 1; dir && d > 0 && !base; d--) {
        snprintf(path, sizeof path, "%s/%s-%d.state", dir, name, d);
        if (!access(path, R_OK)) { if (!llama_state_seq_load_file(ctx, path, 0, ids, n_ids, &count)) die("bad snapshot"); base = d; }
    }
    snprintf(path, sizeof path, "%s/%s-%d.state", dir ? dir : "", name, depth);
    double t = now(); feed(base, depth - base, 512); t = now() - t;
    printf("{\"reached\": %d, \"seconds\": %.1f, \"tok_s\": %.2f}\n", depth, t, (depth - base) / t); fflush(stdout);
    if (dir) { if (!llama_state_seq_save_file(ctx, path, 0, ids, depth)) die("cannot write snapshot"); return; }
    state_size = llama_state_seq_get_size(ctx, 0); state = realloc(state, state_size);
    llama_state_seq_get_data(ctx, state, state_size, 0); state_depth = depth;
}
static int cmp(const void *a, const void *b) { double x = *(double *)a, y = *(double *)b; return (x > y) - (x < y); }
int main(int argc, char **argv) {
    n_args = argc; args = argv;
    llama_log_set(quiet, 0); llama_backend_init();
    double t = now();
    struct llama_model_params mp = llama_model_default_params();
    mp.use_extra_bufts = atoi(arg("repack", "1"));
    mp.lazy_mode = atoi(arg("lazy", "1")) ? LLAMA_LAZY_MODE_ON : LLAMA_LAZY_MODE_OFF;
    struct llama_model *model = llama_model_load_from_file(arg("model", ""), mp);
    if (!model) die("cannot load the model");
    int vocab = llama_vocab_n_tokens(llama_model_get_vocab(model)), threads = atoi(arg("threads", "2"));
    struct llama_context_params cp = llama_context_default_params();
    int fa = atoi(arg("fa", "1")); const char *kv = arg("kv", "f16");
    cp.n_ctx = atoi(arg("ctx", "32768")); cp.n_batch = cp.n_ubatch = 512; cp.n_outputs_max = atoi(arg("nout", "16"));
    cp.n_threads = cp.n_threads_batch = threads;
    cp.flash_attn_type = fa ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    cp.type_k = cp.type_v = !strcmp(kv, "f32") ? GGML_TYPE_F32 : !strcmp(kv, "q8_0") ? GGML_TYPE_Q8_0 : GGML_TYPE_F16;
    ctx = llama_init_from_model(model, cp);
    if (!ctx) die("cannot make the context");
    n_ids = cp.n_ctx + 1024; ids = malloc(n_ids * sizeof *ids);
    unsigned long long seed = 42;
    for (int i = 0; i < n_ids; i++) ids[i] = (int)((seed = seed * 6364136223846793005ull + 1442695040888963407ull) >> 33) % vocab;
    feed(0, 1, 1);
    printf("{\"load_to_first_token_s\": %.2f, ", now() - t); memory();
    int pp = atoi(arg("pp", "512")), tg = atoi(arg("tg", "32")), reps = atoi(arg("reps", "3"));
    char name[64]; snprintf(name, sizeof name, "fa%d-%s", fa, kv);
    double *token = malloc(sizeof(double) * tg * reps), *chunk = malloc(sizeof(double) * reps);
    char *depths = strdup(arg("depths", "0"));
    for (char *d = strtok(depths, ","); d; d = strtok(0, ",")) {
        int depth = atoi(d);
        if (depth + (pp > tg ? pp : tg) > (int)cp.n_ctx) die("depth + pp does not fit ctx");
        for (int r = 0; r < reps; r++) {
            go_to(depth, arg("snapshots", 0), name);
            t = now(); feed(depth, pp, 512); chunk[r] = now() - t;
            go_to(depth, arg("snapshots", 0), name);
            for (int i = 0; i < tg; i++) { t = now(); feed(depth + i, 1, 1); token[r * tg + i] = now() - t; }
        }
        qsort(chunk, reps, sizeof *chunk, cmp); qsort(token, tg * reps, sizeof *token, cmp);
        int n = tg * reps; double sum = 0; for (int i = 0; i < n; i++) sum += token[i];
        printf("{\"depth\": %d, \"prefill_tok_s\": %.2f, \"prefill_best\": %.2f, \"decode_tok_s\": %.3f, \"decode_p50_ms\": %.2f, \"decode_p95_ms\": %.2f, \"decode_min_ms\": %.2f, ",
               depth, pp / chunk[reps / 2], pp / chunk[0], n / sum, 1e3 * token[n / 2], 1e3 * token[n * 95 / 100], 1e3 * token[0]);
        memory();
    }
    return 0;
}
