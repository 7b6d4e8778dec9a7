/* A trace against a kit, in C without dependencies: cc -O2 reader.c -lm -o reader && ./reader KIT_DIR trace.safetensors
   Prints the first point that is off by more than its budget along the run. Status 0: agrees, 1: differs, 2: bad input.
   The forms of a trace, of a sketch and of a kit: FORMAT.md beside. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { char *header, *data; } File;
typedef struct { const char *dtype, *at; size_t bytes, count, width; } Tensor;

static char *slurp(const char *path, size_t *size) {
    FILE *f = fopen(path, "rb");
    if (!f || fseek(f, 0, SEEK_END)) { fprintf(stderr, "cannot read %s\n", path); exit(2); }
    *size = ftell(f);
    rewind(f);
    char *all = calloc(*size + 1, 1);
    if (fread(all, 1, *size, f) != *size) exit(2);
    fclose(f);
    return all;
}

static File open_file(const char *path) {
    size_t size;
    char *all = slurp(path, &size);
    uint64_t length = 0;
    if (size >= 8) memcpy(&length, all, 8);
    if (size < 8 || length > size - 8) { fprintf(stderr, "%s is no whole safetensors file\n", path); exit(2); }
    return (File){memcpy(calloc(length + 1, 1), all + 8, length), all + 8 + length};
}

/* Entries look like "NAME":{"dtype":"F32","shape":[…],"data_offsets":[a,b]}; the metadata has no such key. */
static int find(File f, const char *name, Tensor *t) {
    char wanted[600];
    snprintf(wanted, sizeof wanted, "\"%s\":{\"dtype\":\"", name);
    char *at = strstr(f.header, wanted), *offsets;
    if (!at || !(offsets = strstr(at, "\"data_offsets\":["))) return 0;
    unsigned long a, b;
    sscanf(offsets, "\"data_offsets\":[%lu,%lu]", &a, &b);
    t->dtype = at + strlen(wanted);
    t->at = f.data + a;
    t->width = strncmp(t->dtype, "F64", 3) && strncmp(t->dtype, "I64", 3) ? strncmp(t->dtype, "F32", 3) ? 2 : 4 : 8;
    t->count = (b - a) / t->width;
    return 1;
}

static double value(Tensor t, size_t i) {
    const char *p = t.at + i * t.width;
    if (t.width == 8) { double d; int64_t n; memcpy(&d, p, 8); memcpy(&n, p, 8); return t.dtype[0] == 'I' ? (double)n : d; }
    if (t.width == 4) { float x; memcpy(&x, p, 4); return x; }
    uint16_t h;
    memcpy(&h, p, 2);
    if (t.dtype[0] == 'B') { uint32_t bits = (uint32_t)h << 16; float x; memcpy(&x, &bits, 4); return x; }
    int e = h >> 10 & 31, m = h & 1023;
    double x = e == 31 ? (m ? NAN : INFINITY) : e ? ldexp(1024 + m, e - 25) : ldexp(m, -24);
    return h >> 15 ? -x : x;
}

static double relative(Tensor a, Tensor b, int sketched, double norm) {
    double gap = 0, total = 0, *sums = calloc(1024, 8);
    for (size_t i = 0; i < a.count; i++) {
        double x = value(a, i);
        if (!sketched) { double y = value(b, i); gap += (x - y) * (x - y); total += y * y; continue; }
        uint64_t z = (i + 1) * 0x9E3779B97F4A7C15ull;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
        z ^= z >> 31;
        sums[z & 1023] += z & 1024 ? -x : x;
    }
    for (int i = 0; sketched && i < 1024; i++) gap += (sums[i] - value(b, i)) * (sums[i] - value(b, i));
    free(sums);
    total = sketched ? norm : sqrt(total);
    return total > 0 ? sqrt(gap) / total : gap > 0 ? INFINITY : 0;
}

int main(int argc, char **argv) {
    if (argc != 3) { fprintf(stderr, "usage: reader KIT_DIR trace.safetensors\n"); return 2; }
    char path[4096], name[512], sketch[600], line[1024];
    snprintf(path, sizeof path, "%s/kit.safetensors", argv[1]);
    File kit = open_file(path), theirs = open_file(argv[2]);
    snprintf(path, sizeof path, "%s/budgets.tsv", argv[1]);
    FILE *budgets = fopen(path, "r");
    double budget, norm;
    int met = 0;
    while (budgets && fgets(line, sizeof line, budgets)) {
        if (sscanf(line, "%511[^\t]\t%lf\t%lf", name, &budget, &norm) != 3) continue;
        Tensor a, b;
        snprintf(sketch, sizeof sketch, "%s:sketch", name);
        int whole = find(kit, name, &b);
        if (!find(theirs, name, &a) || (!whole && !find(kit, sketch, &b)) || (whole && a.count != b.count)) continue;
        met++;
        double off = relative(a, b, !whole, norm);
        if (!(off <= budget)) { printf("differs at %s: %.2e, budget %.2e\n", name, off, budget); return 1; }
    }
    if (!met) { fprintf(stderr, "no point of the kit is in %s\n", argv[2]); return 2; }
    printf("agrees: %d points\n", met);
    return 0;
}
