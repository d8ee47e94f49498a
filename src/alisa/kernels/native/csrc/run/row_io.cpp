// See row_io.h.
#include "row_io.h"

#include <sys/uio.h>

#include <cerrno>

namespace alisa {
namespace {

// Buffers of one vectored call; Linux takes 1024 (IOV_MAX).
constexpr size_t kMostBuffers = 512;

template <class Call>
int64_t move_rows(const RowIo& task, const Call& call) {
  iovec buffers[kMostBuffers];
  int64_t total = 0;
  for (size_t first = 0; first < task.count;) {
    size_t count = 0;
    do {
      buffers[count] = {task.memory + static_cast<size_t>(task.rows[first + count]) * task.stride, task.row_bytes};
      ++count;
    } while (count < kMostBuffers && first + count < task.count &&
             task.offsets[first + count] == task.offsets[first + count - 1] + static_cast<int64_t>(task.row_bytes));
    ssize_t moved;
    do {
      moved = call(task.file, buffers, static_cast<int>(count), task.offsets[first]);
    } while (moved < 0 && errno == EINTR);
    if (moved < 0) return -errno;
    total += moved;
    if (static_cast<size_t>(moved) < count * task.row_bytes) return total;
    first += count;
  }
  return total;
}

}  // namespace

int64_t read_rows(const RowIo& task) {
  return move_rows(task, [](int file, const iovec* buffers, int count, off_t offset) { return preadv(file, buffers, count, offset); });
}

int64_t write_rows(const RowIo& task) {
  return move_rows(task, [](int file, const iovec* buffers, int count, off_t offset) { return pwritev(file, buffers, count, offset); });
}

}  // namespace alisa
