/* copies.h: uploads that overlap with work, and downloads; included by cuda.cu behind solver.h. */

static bytes random_bytes(size_t n) {
  bytes made(n);
  for (uint8_t &byte : made) byte = (uint8_t)random_bits();
  return made;
}

/* What is uploaded into the middle of a buffer comes back, and nothing else changes. */
static void run_round_trip(size_t n, size_t offset) {
  char where[80];
  snprintf(where, sizeof where, "%zu bytes at %zu", n, offset);
  bytes whole = random_bytes(offset + n + 3);
  const device_bytes own = on_device(whole);
  bytes part = random_bytes(n);
  std::copy(part.begin(), part.end(), whole.begin() + (ptrdiff_t)offset);
  require(aq_cuda_upload(part.data(), n, own.handle, offset, stream), "upload");
  std::fill(part.begin(), part.end(), 0); /* the caller may change it at once */
  bytes actual(whole.size() + GUARD);
  require(aq_cuda_download(own.handle, 0, actual.data(), actual.size(), stream), "download");
  expect_bytes("upload", where, whole.data(), actual.data(), whole.size());
  expect_guard("upload", where, actual.data(), whole.size());
}

/* Uploads into memory that work queued before still reads, or behind which nothing waits for them. */
static void run_overlap(size_t floats, size_t rounds) {
  char where[80];
  snprintf(where, sizeof where, "%zu uploads of %zu floats", rounds, floats);
  const device_bytes input = on_device(std::vector<float>(floats)), out = on_device(std::vector<float>(floats * rounds));
  std::vector<float> expected, base = normal_values(floats, 1.0f);
  const auto values_of = [&](size_t round) {
    std::vector<float> values(floats);
    std::rotate_copy(base.begin(), base.begin() + (ptrdiff_t)(round % floats), base.end(), values.begin());
    for (float &value : values) value += (float)round;
    return values;
  };
  std::vector<device_bytes *> apart;
  std::vector<std::vector<float>> all;
  for (size_t i = 0; i < rounds; i++) {
    std::vector<float> values = values_of(i);
    uint64_t part = 0;
    require(aq_cuda_upload(values.data(), floats * 4, input.handle, 0, stream), "upload");
    require(aq_cuda_part(out.handle, i * floats * 4, floats * 4, &part), "part");
    require(aq_cuda_add(input.handle, input.handle, floats, (aq_cuda_buffer)part, stream), "add");
    require(aq_cuda_free((aq_cuda_buffer)part), "free");
    for (float value : values) expected.push_back(value + value);
  }
  for (size_t i = 0; i < rounds; i++) {
    all.push_back(values_of(rounds + i));
    apart.push_back(new device_bytes(all[i].data(), floats * 4));
  }
  std::vector<float> actual(floats * rounds);
  require(aq_cuda_download(out.handle, 0, actual.data(), actual.size() * 4, stream), "download");
  expect_bytes("uploads between kernels", where, expected.data(), actual.data(), actual.size() * 4);
  for (size_t i = 0; i < rounds; i++) {
    require(aq_cuda_download(apart[i]->handle, 0, actual.data(), floats * 4, stream), "download");
    expect_bytes("uploads one behind another", where, all[i].data(), actual.data(), floats * 4);
    delete apart[i];
  }
}

static void run_copies(void) {
  for (size_t n : {1, 255, 256, 257, 767, 1023, 1024, 1025, 4096, 5001, 70001}) run_round_trip(n, random_bits() % 3 * 7);
  run_overlap(4, 40);
  run_overlap(300, 12);
#if !defined(AQ_EMULATED) /* once around a device's slots and further */
  run_round_trip(((size_t)9 << 25) + 5, 16);
  run_overlap((size_t)3 << 20, 24);
#endif
}
