// A client that costs little: asks chat completions over many connections and notes when their bytes come.
//
//   loadgen -p PORT -c CONNECTIONS -d SECONDS [-w WARM_UP_S] [-s CHUNKS [-i INTERVAL_US]] [-r REQUESTS_PER_S]
//           [-H HEADER | -k FILE] [-n]
//
// -k: API keys, one a line and all of one length; requests take them in turn. -n: every request has a prompt of its own
// behind a common beginning.
//
// One thread, epoll. Closed loop, or with -r an open one with at most CONNECTIONS in flight. Without -s answers come in
// one piece. Prints one JSON object. A stream counts only with exactly CHUNKS chunks (the marks that backend.c puts in)
// and the closing [DONE]; everything else is an error.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { REQUEST_BYTES = 1024, HEAD_BYTES = 16384, MARK_DIGITS = 19, EVENTS = 512, MOST_RECONNECTS = 200000 };
enum { SIZE, DATA, DATA_END, LAST }; // where a chunked body stands
static const uint64_t SECOND_NS = 1000000000ull;
static const uint64_t DIAL_NS = 200000; // between two new connections: no backlog has room for thousands at once

typedef struct {
    float *values;
    size_t count, capacity;
} Samples;

typedef struct {
    int fd, connected, busy;
    char head[HEAD_BYTES];
    // What follows begins anew with each request.
    size_t sent;
    int has_head, chunked, status, close, done, chunks;
    long length, left; // content-length (-1: none), bytes of the present chunk still to come
    int framing, size_digits, mark_digits;
    char size[32], mark[MARK_DIGITS + 1], tail[8];
    int head_bytes;
    size_t body_bytes;
    uint64_t asked_ns, first_ns, last_ns;
} Conn;

static int port, connections = 64, chunks;
static long interval_us;
static double duration_s = 5, warm_up_s = 1, rate;
static const char *extra_header;
static int own_prompts;
static char *keys, *key_at, *prompt_at; // all keys, and where in the request one goes, and a prompt's number
static size_t key_bytes, key_count;

static Conn *conns, **idle;
static int idle_count, epoll;
static char request[8192];
static size_t request_bytes;
static struct sockaddr_in address;
static uint64_t measure_ns, end_ns;
static Samples first_byte, whole, chunk_delay;
static long done_count, error_count, chunk_count, all_chunks, reconnects, late;
static char first_error[256];

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * SECOND_NS + t.tv_nsec;
}

static int measured(uint64_t at_ns) {
    return at_ns >= measure_ns && at_ns <= end_ns;
}

// --- samples, in microseconds ---

static void note(Samples *s, double us) {
    if (s->count == s->capacity) {
        s->capacity = s->capacity ? s->capacity * 2 : 65536;
        s->values = realloc(s->values, s->capacity * sizeof *s->values);
    }
    s->values[s->count++] = us;
}

static int ascending(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return x < y ? -1 : x > y;
}

static void print_samples(const char *name, Samples *s) {
    qsort(s->values, s->count, sizeof *s->values, ascending);
    printf(",\"%s\":{\"count\":%zu", name, s->count);
    static const double shares[] = {0.5, 0.9, 0.99, 1};
    static const char *const names[] = {"p50", "p90", "p99", "max"};
    for (int i = 0; i < 4; i++) {
        double value = s->count ? s->values[(size_t)(shares[i] * (s->count - 1) + 0.5)] : -1;
        printf(",\"%s\":%.1f", names[i], value);
    }
    printf("}");
}

// --- one connection ---

static void dial(Conn *c) {
    int one = 1;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    c->connected = 0;
    if (c->fd < 0 || (connect(c->fd, (void *)&address, sizeof address) && errno != EINPROGRESS)) {
        perror("loadgen: connect");
        exit(1);
    }
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET | EPOLLRDHUP, .data.ptr = c};
    epoll_ctl(epoll, EPOLL_CTL_ADD, c->fd, &event);
}

// Gives the next request its key and its prompt.
static void vary_request(void) {
    static uint64_t number;
    number++;
    if (key_at)
        memcpy(key_at, keys + number % key_count * (key_bytes + 1), key_bytes);
    if (prompt_at) {
        char digits[21];
        snprintf(digits, sizeof digits, "%020llu", (unsigned long long)(number * 2654435761u));
        memcpy(prompt_at, digits, 20);
    }
}

static void push_request(Conn *c) {
    if (!c->sent)
        vary_request();
    ssize_t n = send(c->fd, request + c->sent, request_bytes - c->sent, MSG_NOSIGNAL);
    if (n > 0)
        c->sent += n;
}

static void ask(Conn *c, uint64_t due_ns) {
    memset(&c->sent, 0, sizeof *c - ((char *)&c->sent - (char *)c));
    c->head[0] = 0;
    c->busy = 1;
    c->length = -1;
    c->asked_ns = due_ns ? due_ns : now_ns();
    if (c->connected)
        push_request(c);
}

static void failed(const char *why, const Conn *c) {
    if (now_ns() >= measure_ns)
        error_count++;
    if (first_error[0])
        return;
    snprintf(first_error, sizeof first_error, "%s: status %d, %d chunks, done %d, %zu bytes: %.100s", why, c->status,
             c->chunks, c->done, c->body_bytes, c->status == 200 ? "" : c->head);
    for (char *p = first_error; *p; p++)
        if (*p == '"' || *p == '\\' || (unsigned char)*p < ' ')
            *p = ' ';
}

static void redial(Conn *c) {
    close(c->fd);
    reconnects++;
    dial(c);
}

// The answer is over: checked, counted, and the next one asked for.
static void finish(Conn *c, uint64_t at_ns, int stopping) {
    int good = c->status == 200 && (chunks ? c->chunks == chunks && c->done : c->chunks >= 1);
    c->busy = 0;
    if (!good)
        failed("wrong answer", c);
    else if (measured(at_ns))
        done_count++;
    if (good && c->asked_ns >= measure_ns) {
        note(&first_byte, (c->first_ns - c->asked_ns) / 1e3);
        note(&whole, (at_ns - c->asked_ns) / 1e3);
    }
    if (c->close)
        redial(c);
    if (rate)
        idle[idle_count++] = c;
    else if (!stopping)
        ask(c, 0);
}

// --- what comes in ---

static void take_mark(Conn *c, uint64_t at_ns) {
    c->chunks++;
    all_chunks++;
    if (!measured(at_ns))
        return;
    chunk_count++;
    note(&chunk_delay, (at_ns - strtoull(c->mark, NULL, 10)) / 1e3);
}

static void take_body(Conn *c, const char *data, size_t n, uint64_t at_ns) {
    if (!n)
        return;
    if (!c->first_ns)
        c->first_ns = at_ns;
    c->body_bytes += n;
    for (const char *p = data, *end = data + n; p < end;) {
        if (!c->mark_digits) { // 0: outside of a mark; else one more than the digits that were seen
            p = memchr(p, '@', end - p);
            if (!p)
                break;
            p++;
            c->mark_digits = 1;
        } else if (c->mark_digits == MARK_DIGITS + 1) {
            if (*p++ == '@')
                take_mark(c, at_ns);
            c->mark_digits = 0;
        } else if (*p >= '0' && *p <= '9') {
            c->mark[c->mark_digits++ - 1] = *p++;
        } else {
            c->mark_digits = 0;
        }
    }
    char seam[80];
    size_t last = n > 64 ? 64 : n;
    memcpy(seam, c->tail, sizeof c->tail);
    memcpy(seam + sizeof c->tail, data + n - last, last);
    c->done |= memmem(seam, sizeof c->tail + last, "[DONE]", 6) != NULL;
    memcpy(c->tail, seam + last, sizeof c->tail);
}

// Bytes that belong to the head; -1 if it is too long. `has_head` says whether it is complete.
static ssize_t take_head(Conn *c, const char *data, size_t n) {
    size_t room = sizeof c->head - 1 - c->head_bytes, before = c->head_bytes;
    if (n > room)
        n = room;
    if (!n)
        return -1;
    memcpy(c->head + c->head_bytes, data, n);
    c->head_bytes += n;
    c->head[c->head_bytes] = 0;
    char *end = strstr(c->head, "\r\n\r\n");
    if (!end)
        return n;
    *end = 0;
    c->has_head = 1;
    c->status = atoi(c->head + sizeof "HTTP/1.1");
    const char *length = strcasestr(c->head, "\r\ncontent-length:");
    if (length)
        c->length = atol(length + sizeof "\r\ncontent-length:" - 1);
    c->chunked = strcasestr(c->head, "\r\ntransfer-encoding: chunked") != NULL;
    c->close = strcasestr(c->head, "\r\nconnection: close") || (c->length < 0 && !c->chunked);
    return end + 4 - c->head - before;
}

// 1: the answer is complete, 0: more will come, -1: it is none.
static int take(Conn *c, const char *data, size_t n, uint64_t at_ns) {
    if (!c->has_head) {
        ssize_t used = take_head(c, data, n);
        if (used < 0)
            return -1;
        data += used, n -= used;
        if (!c->has_head)
            return 0;
    }
    if (!c->chunked) {
        take_body(c, data, n, at_ns);
        return c->length >= 0 && (long)c->body_bytes >= c->length;
    }
    while (n) {
        if (c->framing == DATA) {
            size_t part = (long)n < c->left ? n : (size_t)c->left;
            take_body(c, data, part, at_ns);
            data += part, n -= part, c->left -= part;
            if (!c->left)
                c->framing = DATA_END;
            continue;
        }
        char byte = *data++;
        n--;
        if (byte != '\n') {
            if (c->framing == SIZE && c->size_digits < (int)sizeof c->size - 1)
                c->size[c->size_digits++] = byte;
        } else if (c->framing == LAST) {
            return 1;
        } else if (c->framing == DATA_END) {
            c->framing = SIZE;
        } else {
            c->size[c->size_digits] = 0;
            c->size_digits = 0;
            c->left = strtol(c->size, NULL, 16);
            c->framing = c->left ? DATA : LAST;
        }
    }
    return 0;
}

// The connection has ended.
static void closed(Conn *c, int stopping) {
    int was_busy = c->busy;
    if (was_busy && c->has_head && !c->chunked && c->length < 0) {
        c->close = 1; // such an answer ends so
        finish(c, now_ns(), stopping);
        return;
    }
    if (was_busy && (c->head_bytes || rate))
        failed("closed early", c);
    c->busy = 0;
    redial(c);
    if (was_busy && rate)
        idle[idle_count++] = c;
    else if (was_busy && !stopping)
        ask(c, 0);
}

static void handle(Conn *c, uint32_t events, int stopping) {
    static char buffer[1 << 18];
    if (events & EPOLLERR) {
        failed("no connection", c);
        redial(c);
        if (c->busy)
            ask(c, c->asked_ns);
        return;
    }
    if (events & EPOLLOUT && (!c->connected || (c->busy && c->sent < request_bytes))) {
        c->connected = 1;
        if (c->busy && !c->sent && !rate)
            c->asked_ns = now_ns();
        if (c->busy)
            push_request(c);
    }
    while (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP)) {
        ssize_t n = recv(c->fd, buffer, sizeof buffer, 0);
        if (n <= 0) {
            if (n == 0 || errno != EAGAIN)
                closed(c, stopping);
            return;
        }
        if (!c->busy)
            continue;
        uint64_t at_ns = now_ns();
        int state = take(c, buffer, n, at_ns);
        if (state < 0) {
            failed("head too long", c);
            closed(c, stopping);
            return;
        }
        if (state) {
            finish(c, at_ns, stopping);
            return; // what follows on this connection is a new event
        }
        if (n < (ssize_t)sizeof buffer && !(events & EPOLLRDHUP))
            return;
    }
}

// --- the whole ---

static void write_request(void) {
    char body[4096];
    int n = sprintf(body, "{\"model\":\"mock\",\"messages\":[{\"role\":\"system\",\"content\":\"You are a helpful "
                          "assistant.\"},{\"role\":\"user\",\"content\":\"");
    int prompt = n;
    for (; n < REQUEST_BYTES - 70; n++)
        body[n] = n % 7 == 6 ? ' ' : 'a' + n % 25;
    n += sprintf(body + n, "\"}],\"temperature\":0.7,\"max_tokens\":%d", chunks ? chunks : 150);
    if (chunks)
        n += sprintf(body + n, ",\"stream\":true");
    if (interval_us)
        n += sprintf(body + n, ",\"seed\":%ld", interval_us);
    n += sprintf(body + n, "}");
    request_bytes = sprintf(request,
                            "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nAccept: */*\r\n"
                            "Content-Type: application/json\r\n%s%sContent-Length: %d\r\n\r\n%s",
                            port, extra_header ? extra_header : "", extra_header ? "\r\n" : "", n, body);
    if (own_prompts)
        prompt_at = request + request_bytes - n + prompt;
    if (keys)
        key_at = strstr(request, "Bearer ") + 7;
}

static void read_keys(const char *file) {
    static char header[1024];
    FILE *in = fopen(file, "r");
    size_t bytes = 0, capacity = 1 << 24;
    keys = malloc(capacity);
    if (!in || !(bytes = fread(keys, 1, capacity, in)) || !memchr(keys, '\n', bytes)) {
        fprintf(stderr, "loadgen: there is no key in %s\n", file);
        exit(2);
    }
    key_bytes = (char *)memchr(keys, '\n', bytes) - keys;
    key_count = bytes / (key_bytes + 1);
    snprintf(header, sizeof header, "authorization: Bearer %.*s", (int)key_bytes, keys);
    extra_header = header;
}

static void read_options(int argc, char **argv) {
    for (int option; (option = getopt(argc, argv, "p:c:d:w:s:i:r:H:k:n")) != -1;)
        switch (option) {
        case 'p': port = atoi(optarg); break;
        case 'c': connections = atoi(optarg); break;
        case 'd': duration_s = atof(optarg); break;
        case 'w': warm_up_s = atof(optarg); break;
        case 's': chunks = atoi(optarg); break;
        case 'i': interval_us = atol(optarg); break;
        case 'r': rate = atof(optarg); break;
        case 'H': extra_header = optarg; break;
        case 'k': read_keys(optarg); break;
        case 'n': own_prompts = 1; break;
        default: exit(2);
        }
    if (extra_header && strlen(extra_header) > 1024) {
        fprintf(stderr, "loadgen: the header is too long\n");
        exit(2);
    }
}

// Starts the requests of an open loop that are due; returns nanoseconds until the next one.
static uint64_t start_due(uint64_t begin_ns, uint64_t now) {
    static long scheduled;
    uint64_t due;
    while ((due = begin_ns + (uint64_t)(scheduled * 1e9 / rate)) <= now) {
        scheduled++;
        if (idle_count)
            ask(idle[--idle_count], due);
        else
            late++;
    }
    return due - now;
}

static int in_flight(int answered) {
    int count = 0;
    for (int i = 0; i < connections; i++)
        count += conns[i].busy && (!answered || conns[i].has_head);
    return count;
}

static void run(void) {
    uint64_t begin_ns = now_ns();
    measure_ns = begin_ns + warm_up_s * 1e9;
    end_ns = measure_ns + duration_s * 1e9;
    int dialled = 0;
    for (;;) {
        uint64_t now = now_ns(), patience_ns = SECOND_NS / 5;
        for (; dialled < connections && begin_ns + dialled * DIAL_NS <= now; dialled++) {
            dial(&conns[dialled]);
            if (rate)
                idle[idle_count++] = &conns[dialled];
            else
                ask(&conns[dialled], 0);
        }
        if (dialled < connections)
            patience_ns = DIAL_NS;
        int stopping = now >= end_ns;
        // An open loop ends with its last answer, for a slow one must not be left out; a closed one has no last.
        if (reconnects > MOST_RECONNECTS || (stopping && (!rate || !in_flight(0) || now > end_ns + 10 * SECOND_NS)))
            return;
        if (rate && !stopping) {
            uint64_t next_ns = start_due(begin_ns, now);
            patience_ns = next_ns < patience_ns ? next_ns : patience_ns;
        }
        struct timespec patience = {0, patience_ns};
        struct epoll_event events[EVENTS];
        int n = epoll_pwait2(epoll, events, EVENTS, &patience, NULL);
        for (int i = 0; i < n; i++)
            handle(events[i].data.ptr, events[i].events, stopping);
    }
}

int main(int argc, char **argv) {
    read_options(argc, argv);
    signal(SIGPIPE, SIG_IGN);
    write_request();
    address =
        (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    epoll = epoll_create1(0);
    conns = calloc(connections, sizeof *conns);
    idle = calloc(connections, sizeof *idle);
    run();
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    double cpu_s = used.ru_utime.tv_sec + used.ru_stime.tv_sec + (used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
    printf("{\"requests\":%ld,\"errors\":%ld,\"late\":%ld,\"open\":%d,\"seconds\":%.3f,\"chunks\":%ld,\"all_chunks\":%"
           "ld,\"cpu_s\":%.3f,"
           "\"error\":\"%s\"",
           done_count, error_count, late, in_flight(1), duration_s, chunk_count, all_chunks, cpu_s, first_error);
    print_samples("first_byte_us", &first_byte);
    print_samples("whole_us", &whole);
    print_samples("chunk_delay_us", &chunk_delay);
    printf("}\n");
    return 0;
}
