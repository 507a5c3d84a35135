// An engine that costs nothing: a mock OpenAI server for measuring what stands before it.
//
//   backend PORT [fleet]
//
// fleet: it is there at every loopback address (127.0.0.1, 127.0.0.2, …), each of which stands for a worker of its own,
// and its /metrics is as long as vLLM's.
//
// One thread, epoll, HTTP/1.1 with keep-alive. A chat request's own fields say how it is answered: "stream",
// "max_tokens" (content chunks; some gateways pass it on as "max_completion_tokens"), "seed" (microseconds between two
// chunks; absent: as fast as the reader takes them). Every chunk carries @<CLOCK_MONOTONIC, 19 digits of nanoseconds>@,
// so that a client on this machine can tell how long it took.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MAX_FD = 32768, MAX_BODY = 1 << 20, EVENTS = 512 };

typedef struct {
    int fd;
    uint32_t generation; // tells this connection from an earlier one with the same number
    int blocked;         // the socket's buffer is full
    int streaming, close_after, wants_usage;
    char *in, *out;
    size_t in_len, in_cap, out_len, out_off, out_cap;
    int remaining;                // chunks to be sent
    uint64_t interval_ns, due_ns; // 0: as fast as possible
} Conn;

typedef struct {
    uint64_t due_ns;
    int fd;
    uint32_t generation;
} Timer;

static Conn *conns[MAX_FD];
static char metrics[1 << 16];
static int metrics_bytes;
static Conn *eager[MAX_FD]; // streams without an interval, served round robin
static int eager_count;
static Timer timers[4 * MAX_FD]; // a heap; a stream has one at a time, those of streams that are gone are passed over
static int timer_count;
static uint32_t generations;
static char filler[681]; // the text of a whole answer

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

// --- timers ---

static void timer_push(Conn *c) {
    if (timer_count == 4 * MAX_FD) {
        fprintf(stderr, "backend: too many timers\n");
        exit(1);
    }
    int i = timer_count++;
    for (; i && timers[(i - 1) / 2].due_ns > c->due_ns; i = (i - 1) / 2)
        timers[i] = timers[(i - 1) / 2];
    timers[i] = (Timer){c->due_ns, c->fd, c->generation};
}

static Timer timer_pop(void) {
    Timer first = timers[0], last = timers[--timer_count];
    int i = 0;
    for (int k; (k = 2 * i + 1) < timer_count; i = k) {
        if (k + 1 < timer_count && timers[k + 1].due_ns < timers[k].due_ns)
            k++;
        if (timers[k].due_ns >= last.due_ns)
            break;
        timers[i] = timers[k];
    }
    timers[i] = last;
    return first;
}

// --- output; everything returns -1 when the connection is dead ---

static void drop(Conn *c) {
    for (int i = 0; i < eager_count; i++)
        if (eager[i] == c)
            eager[i--] = eager[--eager_count];
    conns[c->fd] = NULL;
    close(c->fd);
    free(c->in);
    free(c->out);
    free(c);
}

static int flush_out(Conn *c) {
    while (c->out_off < c->out_len) {
        ssize_t n = send(c->fd, c->out + c->out_off, c->out_len - c->out_off, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0) {
            c->blocked = 1;
            return errno == EAGAIN ? 0 : -1;
        }
        c->out_off += n;
    }
    c->out_off = c->out_len = 0;
    c->blocked = 0;
    return 0;
}

static int put(Conn *c, const char *data, size_t n) {
    if (!c->blocked && !c->out_len) {
        ssize_t sent = send(c->fd, data, n, MSG_NOSIGNAL);
        if (sent == (ssize_t)n)
            return 0;
        if (sent < 0 && errno != EAGAIN)
            return -1;
        if (sent > 0)
            data += sent, n -= sent;
        c->blocked = 1;
    }
    if (c->out_len + n > c->out_cap) {
        c->out_cap = (c->out_len + n) * 2;
        c->out = realloc(c->out, c->out_cap);
    }
    memcpy(c->out + c->out_len, data, n);
    c->out_len += n;
    return 0;
}

static int reply(Conn *c, const char *status, const char *type, const char *body, size_t n) {
    static char whole[sizeof metrics + 512];
    int head = snprintf(whole, 512, "HTTP/1.1 %s\r\nserver: mock\r\ncontent-type: %s\r\ncontent-length: %zu\r\n\r\n",
                        status, type, n);
    memcpy(whole + head, body, n);
    return put(c, whole, head + n);
}

#define ID "\"id\":\"chatcmpl-0123456789abcdef0123456789abcdef\""
#define MADE "\"created\":1790000000,\"model\":\"mock\""
#define CHUNK "data: {" ID ",\"object\":\"chat.completion.chunk\"," MADE ",\"choices\":"
#define DELTA CHUNK "[{\"index\":0,\"delta\":{"
#define FINISH "},\"logprobs\":null,\"finish_reason\":"

static int chunked(char *to, const char *event) {
    return sprintf(to, "%zx\r\n%s\r\n", strlen(event), event);
}

static int send_chunk(Conn *c) {
    char event[512], framed[600];
    sprintf(event, DELTA "\"content\":\" @%019llu@\"" FINISH "null}]}\n\n", (unsigned long long)now_ns());
    return put(c, framed, chunked(framed, event));
}

static int send_end(Conn *c) {
    char framed[2048];
    int n = chunked(framed, DELTA FINISH "\"stop\"}]}\n\n");
    if (c->wants_usage)
        n += chunked(framed + n, CHUNK "[],\"usage\":{\"prompt_tokens\":200,\"completion_tokens\":256,"
                                       "\"total_tokens\":456}}\n\n");
    n += chunked(framed + n, "data: [DONE]\n\n");
    n += sprintf(framed + n, "0\r\n\r\n");
    return put(c, framed, n);
}

// One emission of a stream; 1 when it was the last.
static int step(Conn *c) {
    if (c->remaining > 0) {
        c->remaining--;
        return send_chunk(c);
    }
    if (send_end(c))
        return -1;
    c->streaming = 0;
    if (c->close_after)
        shutdown(c->fd, SHUT_WR);
    return 1;
}

// --- requests ---

static const char *field(const char *body, const char *quoted_name) {
    const char *p = strstr(body, quoted_name);
    if (!p)
        return "";
    p += strlen(quoted_name);
    while (*p == ' ' || *p == ':')
        p++;
    return p;
}

static int is_true(const char *body, const char *quoted_name) {
    return !strncmp(field(body, quoted_name), "true", 4);
}

static int chat(Conn *c, const char *body) {
    char text[2048], event[512];
    if (!is_true(body, "\"stream\"")) {
        int n = sprintf(text,
                        "{" ID ",\"object\":\"chat.completion\"," MADE ",\"choices\":[{\"index\":0,\"message\":{"
                        "\"role\":\"assistant\",\"content\":\"@%019llu@ %s\",\"refusal\":null,\"tool_calls\":[]},"
                        "\"logprobs\":null,\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":200,"
                        "\"total_tokens\":350,\"completion_tokens\":150}}",
                        (unsigned long long)now_ns(), filler);
        return reply(c, "200 OK", "application/json", text, n);
    }
    const char *most = field(body, "\"max_tokens\"");
    c->remaining = atoi(*most ? most : field(body, "\"max_completion_tokens\""));
    c->interval_ns = atol(field(body, "\"seed\"")) * 1000ull;
    c->wants_usage = is_true(body, "\"include_usage\"");
    c->streaming = 1;
    int n = sprintf(text, "HTTP/1.1 200 OK\r\nserver: mock\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
                          "transfer-encoding: chunked\r\n\r\n");
    sprintf(event, DELTA "\"role\":\"assistant\",\"content\":\"\"" FINISH "null}]}\n\n");
    n += chunked(text + n, event);
    if (put(c, text, n))
        return -1;
    if (c->interval_ns) {
        c->due_ns = now_ns();
        timer_push(c);
    } else {
        eager[eager_count++] = c;
    }
    return 0;
}

static int answer(Conn *c, const char *path, const char *body) {
    static const char models[] = "{\"object\":\"list\",\"data\":[{\"id\":\"mock\",\"object\":\"model\","
                                 "\"created\":1790000000,\"owned_by\":\"mock\",\"max_model_len\":32768}]}";
    if (!strncmp(path, "/v1/chat/completions", 20))
        return chat(c, body);
    if (!strncmp(path, "/v1/models", 10))
        return reply(c, "200 OK", "application/json", models, sizeof models - 1);
    if (!strncmp(path, "/health", 7) || !strncmp(path, "/ping", 5))
        return reply(c, "200 OK", "application/json", "", 0);
    if (!strncmp(path, "/metrics", 8))
        return reply(c, "200 OK", "text/plain", metrics, metrics_bytes);
    if (!strncmp(path, "/version", 8))
        return reply(c, "200 OK", "application/json", "{\"version\":\"0\"}", 15);
    return reply(c, "404 Not Found", "application/json", "{}", 2);
}

// The value of a header, or NULL.
static const char *header(const char *head, const char *end, const char *name) {
    size_t n = strlen(name);
    for (const char *line = head; line && line < end;
         line = memchr(line, '\n', end - line), line = line ? line + 1 : line)
        if ((size_t)(end - line) > n && !strncasecmp(line, name, n) && line[n] == ':') {
            for (line += n + 1; *line == ' '; line++)
                ;
            return line;
        }
    return NULL;
}

// Bytes of a chunked body including its framing, 0 if it is not complete, -1 if it is too large; text goes to `body`.
static ssize_t dechunk(const char *from, size_t have, char *body) {
    const char *p = from, *limit = from + have;
    size_t length = 0;
    for (;;) {
        const char *line = memmem(p, limit - p, "\r\n", 2);
        if (!line)
            return 0;
        size_t n = strtoul(p, NULL, 16);
        if ((size_t)(limit - line) < n + 4)
            return 0;
        if (length + n >= MAX_BODY)
            return -1;
        memcpy(body + length, line + 2, n);
        length += n;
        p = line + n + 4;
        if (!n) {
            body[length] = 0;
            return p - from;
        }
    }
}

// Answers what has come in, one request after the other; a stream ends before the next one begins.
static int serve(Conn *c) {
    static char body[MAX_BODY];
    while (!c->streaming && c->in_len) {
        char *end = memmem(c->in, c->in_len, "\r\n\r\n", 4);
        if (!end)
            return 0;
        size_t head = end + 4 - c->in, have = c->in_len - head, used;
        const char *encoding = header(c->in, end + 2, "transfer-encoding");
        const char *length = header(c->in, end + 2, "content-length");
        if (encoding && !strncasecmp(encoding, "chunked", 7)) {
            ssize_t n = dechunk(c->in + head, have, body);
            if (n <= 0)
                return n;
            used = head + n;
        } else {
            size_t n = length ? strtoul(length, NULL, 10) : 0;
            if (n >= MAX_BODY)
                return -1;
            if (have < n)
                return 0;
            memcpy(body, c->in + head, n);
            body[n] = 0;
            used = head + n;
        }
        const char *connection = header(c->in, end + 2, "connection");
        c->close_after = connection && !strncasecmp(connection, "close", 5);
        char *path = memchr(c->in, ' ', end - c->in);
        if (!path || answer(c, path + 1, body))
            return -1;
        memmove(c->in, c->in + used, c->in_len - used);
        c->in_len -= used;
        if (c->close_after && !c->streaming)
            shutdown(c->fd, SHUT_WR);
    }
    return 0;
}

static int receive(Conn *c) {
    for (;;) {
        if (c->in_cap - c->in_len < 4096) {
            c->in_cap *= 2;
            c->in = realloc(c->in, c->in_cap);
        }
        size_t room = c->in_cap - c->in_len;
        ssize_t n = recv(c->fd, c->in + c->in_len, room, 0);
        if (n < 0)
            return errno == EAGAIN ? serve(c) : -1;
        if (n == 0)
            return -1;
        c->in_len += n;
        if ((size_t)n < room)
            return serve(c);
    }
}

// --- the loop ---

static void accept_all(int listener, int epoll) {
    int fd, one = 1;
    struct sockaddr_in peer;
    socklen_t size = sizeof peer;
    while ((fd = accept4(listener, (void *)&peer, &size, SOCK_NONBLOCK)) >= 0) {
        if (fd >= MAX_FD || ntohl(peer.sin_addr.s_addr) >> 24 != 127) { // nobody from elsewhere
            close(fd);
            continue;
        }
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        Conn *c = calloc(1, sizeof *c);
        c->fd = fd;
        c->generation = ++generations;
        c->in = malloc(c->in_cap = 8192);
        conns[fd] = c;
        struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET | EPOLLRDHUP, .data.fd = fd};
        epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
    }
}

static int handle(Conn *c, uint32_t events) {
    if (events & (EPOLLERR | EPOLLHUP))
        return -1;
    if (events & EPOLLOUT) {
        if (c->out_len && flush_out(c))
            return -1;
        if (!c->out_len)
            c->blocked = 0;
    }
    if (events & EPOLLIN && receive(c))
        return -1;
    char byte;
    return events & EPOLLRDHUP && recv(c->fd, &byte, 1, MSG_PEEK) == 0 ? -1 : 0;
}

static void serve_eager(void) {
    for (int i = 0; i < eager_count;) {
        Conn *c = eager[i];
        int ended = c->blocked ? 0 : step(c);
        if (ended > 0) {
            eager[i] = eager[--eager_count];
            ended = serve(c);
        } else {
            i += ended == 0;
        }
        if (ended < 0)
            drop(c);
    }
}

static void serve_timers(void) {
    uint64_t now = now_ns();
    while (timer_count && timers[0].due_ns <= now) {
        Timer timer = timer_pop();
        Conn *c = conns[timer.fd];
        if (!c || c->generation != timer.generation || !c->streaming)
            continue;
        int ended = step(c);
        if (ended > 0)
            ended = serve(c);
        else if (ended == 0) {
            c->due_ns += c->interval_ns;
            timer_push(c);
        }
        if (ended < 0)
            drop(c);
    }
}

// How long the loop may sleep; NULL for until something happens.
static const struct timespec *patience(struct timespec *t) {
    t->tv_sec = t->tv_nsec = 0;
    for (int i = 0; i < eager_count; i++)
        if (!eager[i]->blocked)
            return t;
    if (!timer_count)
        return NULL;
    uint64_t now = now_ns(), due = timers[0].due_ns;
    if (due > now) {
        t->tv_sec = (due - now) / 1000000000ull;
        t->tv_nsec = (due - now) % 1000000000ull;
    }
    return t;
}

// An idle vLLM's metrics: a few gauges, and some forty histograms.
static void write_metrics(void) {
    const char *gauges[] = {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc",
                            "generation_tokens_total"};
    for (int i = 0; i < 4; i++)
        metrics_bytes += sprintf(metrics + metrics_bytes,
                                 "# HELP vllm:%s As it says.\n# TYPE vllm:%s gauge\n"
                                 "vllm:%s{engine=\"0\",model_name=\"mock\"} 0.0\n",
                                 gauges[i], gauges[i], gauges[i]);
    for (int i = 0; i < 40; i++)
        for (int j = 0; j < 14; j++)
            metrics_bytes += sprintf(metrics + metrics_bytes,
                                     "vllm:histogram_%d_seconds_bucket{engine=\"0\",le=\"%d.0\",model_name="
                                     "\"mock\"} 0.0\n",
                                     i, j);
}

int main(int argc, char **argv) {
    int fleet = argc == 3 && !strcmp(argv[2], "fleet"); // at every loopback address, each of which is a worker
    if (argc != 2 && !fleet) {
        fprintf(stderr, "usage: backend PORT [fleet]\n");
        return 2;
    }
    signal(SIGPIPE, SIG_IGN);
    if (fleet)
        write_metrics();
    for (size_t i = 0; i + 1 < sizeof filler; i++)
        filler[i] = i % 6 == 5 ? ' ' : 'a' + i % 23;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = htons(atoi(argv[1])), .sin_addr.s_addr = htonl(fleet ? INADDR_ANY : INADDR_LOOPBACK)};
    if (bind(listener, (void *)&address, sizeof address) || listen(listener, 4096)) {
        perror("backend");
        return 1;
    }
    int epoll = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = listener}, events[EVENTS];
    epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        struct timespec t;
        int n = epoll_pwait2(epoll, events, EVENTS, patience(&t), NULL);
        for (int i = 0; i < n; i++) {
            Conn *c = conns[events[i].data.fd];
            if (events[i].data.fd == listener)
                accept_all(listener, epoll);
            else if (c && handle(c, events[i].events))
                drop(c);
        }
        serve_eager();
        serve_timers();
    }
}
