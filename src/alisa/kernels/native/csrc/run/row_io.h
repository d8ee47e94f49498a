// Many rows between a file and memory in one call: what a disk tier does, without the interpreter in between.
#pragma once

#include <cstddef>
#include <cstdint>

namespace alisa {

struct RowIo {
  int file;
  const int64_t* offsets;  // [n] in the file, ascending; neighbours go in one system call
  uint8_t* memory;
  size_t stride;           // bytes from one row of memory to the next
  const int64_t* rows;     // [n] rows of memory
  size_t count;
  size_t row_bytes;
};

// Moves every row; returns the bytes moved, fewer than asked for if the file ends, or -errno.
int64_t read_rows(const RowIo& task);
int64_t write_rows(const RowIo& task);

}  // namespace alisa
