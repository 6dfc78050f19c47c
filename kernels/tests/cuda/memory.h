/* memory.h: every allocation of the library fails once, of the device and of the host: the call says so or
 * does without, the same call succeeds afterwards, and nothing is left when all handles are freed. Under the
 * emulator alone; included by cuda.cu. */

#if defined(AQ_EMULATED)

/* Calls with all that the library allocates, of which the one with this number fails; how many said so. */
static size_t run_allocations(size_t number, bytes *result) {
  const size_t n = 64, tokens = 9, rows = 16;
  char where[40];
  snprintf(where, sizeof where, "allocation %zu", number);
  state = 5;
  const std::vector<float> x = normal_values(tokens * n, 1.0f), w = normal_values(rows * n, 1.0f), zeros(n * n);
  setenv("AQ_EMULATED_FAILS", where + strlen("allocation "), 1);
  size_t refused = 0;
  uint64_t own = 0, handles[5] = {};
  const auto tried = [&](const char *what, const std::function<int32_t()> &call) {
    int32_t status = call();
    refused += status == AQ_E_MEMORY;
    if (status == AQ_E_MEMORY) status = call();
    expect_status(what, where, status, AQ_OK);
  };
  tried("create a stream", [&] { return aq_cuda_create_stream(0, &own); });
  const size_t sizes[] = {tokens * n * 4, rows * n * 4, tokens * rows * 4, n * n * 4, n * 4};
  for (size_t i = 0; i < COUNT(sizes); i++) tried("allocate", [&] { return aq_cuda_allocate(sizes[i], handles + i, own); });
  const float *data[] = {x.data(), w.data(), zeros.data(), zeros.data()};
  for (size_t i = 0; i < COUNT(data); i++) tried("upload", [&] { return aq_cuda_upload(data[i], sizes[i], handles[i], 0, own); });
  tried("linear", [&] { return aq_cuda_linear(handles[0], tokens, handles[1], AQ_F32, 0, rows, n, handles[2], own); });
  tried("moment", [&] { return aq_cuda_accumulate_moment(handles[0], 0, 0, tokens, n, n, n, handles[3], own); });
  tried("diagonal", [&] { return aq_cuda_accumulate_moment(handles[0], handles[0], 0, tokens, n, n, 1, handles[4], own); });
  tried("product", [&] { return aq_cuda_multiply(handles[0], handles[3], tokens, n, n, handles[0], own); });
  result->assign(sizes[2] + sizes[3], 0);
  tried("download", [&] { return aq_cuda_download(handles[2], 0, result->data(), sizes[2], own); });
  tried("download", [&] { return aq_cuda_download(handles[3], 0, result->data() + sizes[2], sizes[3], own); });
  for (uint64_t handle : handles) expect_status("free", where, aq_cuda_free(handle), AQ_OK);
  expect_status("free the stream", where, aq_cuda_free_stream(own), AQ_OK);
  unsetenv("AQ_EMULATED_FAILS");
  /* a device whose memory is full with a stream's word and one buffer has room for both: nothing else is
   * there */
  setenv("AQ_EMULATED_BYTES", "1028", 1);
  expect_status("a stream in what is left", where, aq_cuda_create_stream(0, &own), AQ_OK);
  expect_status("a buffer in what is left", where, aq_cuda_allocate(1024, handles, own), AQ_OK);
  expect_status("free", where, aq_cuda_free(handles[0]), AQ_OK);
  expect_status("free the stream", where, aq_cuda_free_stream(own), AQ_OK);
  unsetenv("AQ_EMULATED_BYTES");
  return refused;
}

static void run_memory(void) {
  const uint64_t before = state;
  bytes expected, found;
  run_allocations(0, &expected);
  size_t refused = 0;
  for (size_t number = 1; number < 25; number++) {
    refused += run_allocations(number, &found);
    expect_bytes("results", "an allocation failed", expected.data(), found.data(), expected.size());
  }
  if (refused < 8) expect_status("allocations that fail are told", "memory", AQ_OK, AQ_E_MEMORY);
  state = before;
}

#else

static void run_memory(void) {}

#endif
