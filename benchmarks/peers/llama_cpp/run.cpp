// One run of llama.cpp: a prompt, then tokens one by one; what each took as a line of JSON on standard output.
//   llama_cpp_run MODEL.gguf LAYERS_ON_CPU PROMPT_TOKENS NEW_TOKENS THREADS mmap|copy REPEATS [thread]
// With "thread" times are of the first thread's own clock, which is what a run on a CPU with one thread takes.
// LAYERS_ON_CPU: of that many layers, counted from the first, the routed experts stay in host memory.
// Built by build.sh against llama.cpp's own C interface.

#include "ggml-backend.h"
#include "llama.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <string>
#include <vector>

static bool thread_clock = false;

static double now() {
    if (thread_clock) {
        timespec time;
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
        return time.tv_sec + 1e-9 * time.tv_nsec;
    }
    using namespace std::chrono;
    return duration<double>(steady_clock::now().time_since_epoch()).count();
}

static void check(bool good, const char * what) {
    if (!good) {
        fprintf(stderr, "failed: %s\n", what);
        exit(1);
    }
}

static size_t used_bytes() {
    ggml_backend_dev_t gpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_GPU);
    if (gpu == nullptr) {
        return 0;
    }
    size_t free = 0, total = 0;
    ggml_backend_dev_memory(gpu, &free, &total);
    return total - free;
}

static llama_token likeliest(llama_context * context, int vocabulary) {
    const float * logits = llama_get_logits_ith(context, -1);
    check(logits != nullptr, "logits");
    return (llama_token) (std::max_element(logits, logits + vocabulary) - logits);
}

int main(int count, char ** words) {
    check(count == 8 || count == 9, "usage: llama_cpp_run MODEL LAYERS_ON_CPU PROMPT NEW THREADS mmap|copy REPEATS [thread]");
    thread_clock = count == 9 && std::string(words[8]) == "thread";
    const int on_cpu = atoi(words[2]), prompt_tokens = atoi(words[3]), new_tokens = atoi(words[4]);
    const int threads = atoi(words[5]), repeats = atoi(words[7]);
    const bool mapped = std::string(words[6]) == "mmap";

    llama_backend_init();
    const size_t before = used_bytes();  // with the context that reading it makes

    std::vector<std::string> patterns;
    for (int layer = 0; layer < on_cpu; ++layer) {
        patterns.push_back("blk\\." + std::to_string(layer) + "\\.ffn_(up|down|gate|gate_up)_exps");
    }
    std::vector<llama_model_tensor_buft_override> places;
    for (const std::string & pattern : patterns) {
        places.push_back({ pattern.c_str(), ggml_backend_cpu_buffer_type() });
    }
    places.push_back({ nullptr, nullptr });

    llama_model_params options = llama_model_default_params();
    options.n_gpu_layers = 999;
    options.load_mode = mapped ? LLAMA_LOAD_MODE_MMAP : LLAMA_LOAD_MODE_NONE;
    options.tensor_buft_overrides = places.data();
    const double start = now();
    llama_model * model = llama_model_load_from_file(words[1], options);
    check(model != nullptr, "load");

    llama_context_params limits = llama_context_default_params();
    limits.n_ctx = (uint32_t) (prompt_tokens + new_tokens + 8);
    limits.n_batch = limits.n_ubatch = (uint32_t) prompt_tokens;
    limits.n_threads = limits.n_threads_batch = threads;
    llama_context * context = llama_init_from_model(model, limits);
    check(context != nullptr, "context");
    const double loaded = now() - start;

    const int vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
    std::vector<llama_token> prompt;
    srand(1);
    for (int i = 0; i < prompt_tokens; ++i) {
        prompt.push_back(rand() % vocabulary);
    }

    std::vector<double> firsts, steps;
    size_t peak = used_bytes();
    for (int repeat = 0; repeat <= repeats; ++repeat) {  // the first one warms up
        llama_memory_clear(llama_get_memory(context), true);
        double before_step = now();
        check(llama_decode(context, llama_batch_get_one(prompt.data(), prompt_tokens)) == 0, "prompt");
        llama_token token = likeliest(context, vocabulary);
        const double first = now() - before_step;
        std::vector<double> own;
        for (int i = 0; i < new_tokens; ++i) {
            before_step = now();
            check(llama_decode(context, llama_batch_get_one(&token, 1)) == 0, "step");
            token = likeliest(context, vocabulary);
            own.push_back(now() - before_step);
        }
        peak = std::max(peak, used_bytes());
        if (repeat > 0) {
            firsts.push_back(first);
            steps.insert(steps.end(), own.begin(), own.end());
        }
    }
    std::sort(firsts.begin(), firsts.end());
    std::sort(steps.begin(), steps.end());
    printf("{\"load_seconds\": %.6f, \"first_token_seconds\": %.6f, \"step_seconds\": %.6f, "
           "\"slowest_step_seconds\": %.6f, \"gpu_bytes\": %zu, \"version\": \"%s\"}\n",
           loaded, firsts[firsts.size() / 2], steps[steps.size() / 2], steps.back(), peak - before, llama_version());
    llama_free(context);
    llama_model_free(model);
    return 0;
}
