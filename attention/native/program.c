/* Runs a list of kernels: from Python one call for all of them. */
#include <stdint.h>

struct step {
    void (*kernel)(const void *);
    const void *arguments;
};

__attribute__((visibility("default"))) void run(const struct step *steps, int64_t count) {
    for (int64_t i = 0; i < count; i++) steps[i].kernel(steps[i].arguments);
}
