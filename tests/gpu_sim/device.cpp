// A CUDA device that computes on host memory, for the CPU build of torch.
//
// Tensors "on cuda" have host memory that is counted per device. A boxed fallback for the CUDA
// dispatch key views each of them as a CPU tensor on the same memory, calls the CPU kernel, and
// wraps the results. Autograd, autocast, optimizers and custom functions work unchanged. As on a
// GPU, tensors on two devices raise torch's error, and operations for which the host has to wait are
// reported to a callback.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <string>
#include <unordered_map>
#include <unordered_set>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::IValue;
constexpr auto kCard = c10::DeviceType::CUDA;
constexpr int kMaxCards = 16;

size_t read_setting(const char* name, size_t otherwise) {
  const char* value = std::getenv(name);
  return value ? std::strtoull(value, nullptr, 10) : otherwise;
}

DeviceIndex count_cards() {
  return static_cast<DeviceIndex>(read_setting("SIMULATED_CARDS", 1));
}

thread_local DeviceIndex current_card = 0;

// --- memory ------------------------------------------------------------------------------------

struct Usage {
  std::atomic<int64_t> allocated{0}, reserved{0}, peak{0};
} usage[kMaxCards];

void raise_to(std::atomic<int64_t>& highest, int64_t value) {
  int64_t before = highest.load();
  while (before < value && !highest.compare_exchange_weak(before, value)) {
  }
}

int64_t capacity() {
  return static_cast<int64_t>(read_setting("SIMULATED_BYTES", 80'000'000'000));
}

using Callback = void (*)(const char*);
std::atomic<Callback> on_peak{nullptr};

void check_capacity(DeviceIndex card, int64_t bytes) {
  if (usage[card].allocated + bytes <= capacity()) return;
  C10_THROW_ERROR(OutOfMemoryError,
                  "CUDA out of memory. Tried to allocate " + std::to_string(bytes) + " bytes. GPU " +
                      std::to_string(card) + " has a total capacity of " +
                      std::to_string(capacity()) + " bytes (simulated).");
}

// Freed memory stays reserved, as in torch's caching allocator, until `sim_empty_cache`.
void count(DeviceIndex card, int64_t bytes) {
  auto& use = usage[card];
  if (bytes > 0) check_capacity(card, bytes);
  const int64_t now = use.allocated.fetch_add(bytes) + bytes;
  if (bytes <= 0) return;
  const int64_t before = use.peak.load();
  raise_to(use.peak, now);
  if (Callback callback = on_peak.load(); callback && now > before + before / 50)
    callback(std::to_string(now).c_str());
  raise_to(use.reserved, now);
}

// Memory of a device tensor: the host memory that holds it, and its share of the device.
struct Block {
  c10::DataPtr host;
  DeviceIndex card;
  int64_t bytes;
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  count(block->card, -block->bytes);
  delete block;
}

int64_t round_up(size_t bytes) { return static_cast<int64_t>((bytes + 511) / 512 * 512); }

c10::DataPtr to_device_memory(c10::DataPtr host, size_t bytes, DeviceIndex card) {
  const int64_t rounded = round_up(bytes);
  count(card, rounded);
  void* data = host.get();
  auto* block = new Block{std::move(host), card, rounded};
  return {data, block, &release, Device(kCard, card)};
}

struct CardAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    check_capacity(current_card, static_cast<int64_t>(bytes));
    return to_device_memory(c10::GetCPUAllocator()->allocate(bytes), bytes, current_card);
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
} card_allocator;

std::mutex pinned_mutex;
std::unordered_map<const char*, size_t> pinned;

void release_pinned(void* data) {
  {
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned.erase(static_cast<const char*>(data));
  }
  std::free(data);
}

bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> lock(pinned_mutex);
  const auto* at = static_cast<const char*>(data);
  for (const auto& [start, size] : pinned)
    if (start <= at && at < start + size) return true;
  return false;
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = std::aligned_alloc(64, (std::max<size_t>(bytes, 1) + 63) / 64 * 64);
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned[static_cast<const char*>(data)] = std::max<size_t>(bytes, 1);
    return {data, data, &release_pinned, Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release_pinned; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
} pinned_allocator;

// --- what torch asks of a device type -------------------------------------------------------------

c10::Stream only_stream(Device device) {
  return c10::Stream(c10::Stream::DEFAULT, Device(kCard, device.has_index() ? device.index() : current_card));
}

struct CardGuard final : public c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = kCard;

  c10::DeviceType type() const override { return kCard; }
  DeviceIndex deviceCount() const noexcept override { return count_cards(); }
  Device getDevice() const override { return Device(kCard, current_card); }
  Device exchangeDevice(Device device) const override {
    const Device before = getDevice();
    uncheckedSetDevice(device);
    return before;
  }
  void setDevice(Device device) const override {
    TORCH_CHECK(device.index() < count_cards(), "CUDA error: invalid device ordinal");
    uncheckedSetDevice(device);
  }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.has_index()) current_card = device.index();
  }
  c10::Stream getStream(Device device) const noexcept override { return only_stream(device); }
  c10::Stream getDefaultStream(Device device) const override { return only_stream(device); }
  c10::Stream getNewStream(Device device, int) const override { return only_stream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override {
    return only_stream(stream.device());
  }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
  void record(void** event, const c10::Stream&, const DeviceIndex,
              const c10::EventFlag) const override {
    static char some_event;
    *event = &some_event;
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  void synchronizeEvent(void*) const override {}
};

C10_REGISTER_GUARD_IMPL(CUDA, CardGuard)

const bool is_allocator_set = [] {
  c10::SetAllocator(kCard, &card_allocator, 1);
  return true;
}();

// --- waits of the host ------------------------------------------------------------------------------

std::atomic<Callback> on_wait{nullptr};

void report_wait(const std::string& what) {
  if (Callback callback = on_wait.load()) callback(what.c_str());
}

const std::unordered_set<std::string> kWaits = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal",
    "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::bincount",
    "aten::repeat_interleave", "aten::is_nonzero", "aten::_unique",
};

// --- views of device tensors as CPU tensors -----------------------------------------------------------

// Memory that belongs to another storage.
void release_owner(void* owner) { delete static_cast<c10::Storage*>(owner); }

// Host views of the device storages of one call, and the way back.
struct Views {
  std::unordered_map<c10::StorageImpl*, c10::Storage> host_of;
  std::unordered_map<c10::StorageImpl*, c10::Storage> card_of;
  std::unordered_map<c10::TensorImpl*, std::pair<at::Tensor, at::Tensor>> pairs;  // by host tensor
  std::unordered_map<c10::TensorImpl*, at::Tensor> known;                         // by device tensor
  DeviceIndex card = -1;
  at::Tensor on_cpu;  // an operand that is not on the device

  at::Tensor to_host(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_cuda()) {
      if (tensor.dim() > 0 && tensor.device().is_cpu()) on_cpu = tensor;
      return tensor;
    }
    auto* impl = tensor.unsafeGetTensorImpl();
    if (auto found = known.find(impl); found != known.end()) return found->second;
    const DeviceIndex index = tensor.device().index();
    if (card >= 0 && index != card && tensor.dim() > 0) other_card = index;
    if (card < 0 || tensor.dim() > 0) card = index;
    const auto& storage = tensor.storage();
    auto* key = storage.unsafeGetStorageImpl();
    auto found = host_of.find(key);
    if (found == host_of.end()) {
      auto* owner = new c10::Storage(storage);
      c10::DataPtr data(const_cast<void*>(storage.data()), owner,
                        &release_owner,
                        Device(c10::DeviceType::CPU));
      c10::Storage host(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data),
                        c10::GetCPUAllocator(), /*resizable=*/true);
      card_of.emplace(host.unsafeGetStorageImpl(), storage);
      found = host_of.emplace(key, std::move(host)).first;
    }
    auto host = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(found->second), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
    host.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(),
                                                      tensor.storage_offset());
    if (tensor.is_conj()) host._set_conj(true);
    if (impl->is_wrapped_number()) host.unsafeGetTensorImpl()->set_wrapped_number(true);
    known.emplace(impl, host);
    pairs.emplace(host.unsafeGetTensorImpl(), std::make_pair(tensor, host));
    return host;
  }

  DeviceIndex other_card = -1;

  c10::Storage to_card_storage(const c10::Storage& host) {
    auto* key = host.unsafeGetStorageImpl();
    if (auto found = card_of.find(key); found != card_of.end()) return found->second;
    auto* owner = new c10::Storage(host);
    c10::DataPtr data(const_cast<void*>(host.data()), owner,
                      &release_owner,
                      Device(c10::DeviceType::CPU));
    c10::Storage storage(c10::Storage::use_byte_size_t(), host.nbytes(),
                         to_device_memory(std::move(data), host.nbytes(), card),
                         &card_allocator, /*resizable=*/true);
    card_of.emplace(key, storage);
    return storage;
  }

  at::Tensor to_card(const at::Tensor& host) {
    if (!host.defined() || host.is_cuda()) return host;
    if (auto found = pairs.find(host.unsafeGetTensorImpl()); found != pairs.end())
      return found->second.first;
    auto tensor = at::detail::make_tensor<c10::TensorImpl>(
        to_card_storage(host.storage()), c10::DispatchKeySet(c10::DispatchKey::CUDA), host.dtype());
    tensor.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(),
                                                        host.storage_offset());
    return tensor;
  }

  // Repeats on the device tensors what an in-place or out= operation did to sizes and memory.
  void update() {
    for (auto& [key, host] : host_of) {
      const auto storage = card_of.at(host.unsafeGetStorageImpl());
      if (host.data() == storage.data()) continue;
      auto* owner = new c10::Storage(host);
      c10::DataPtr data(const_cast<void*>(host.data()), owner,
                        &release_owner,
                        Device(c10::DeviceType::CPU));
      auto* impl = storage.unsafeGetStorageImpl();
      impl->set_data_ptr(to_device_memory(std::move(data), host.nbytes(), card));
      impl->set_nbytes(host.nbytes());
    }
    for (auto& [impl, pair] : pairs) {
      auto& [tensor, host] = pair;
      auto* own = tensor.unsafeGetTensorImpl();
      const auto storage = to_card_storage(host.storage());
      if (storage.unsafeGetStorageImpl() != tensor.storage().unsafeGetStorageImpl())
        own->set_storage_keep_dtype(storage);
      if (tensor.sizes() != host.sizes() || tensor.strides() != host.strides() ||
          tensor.storage_offset() != host.storage_offset())
        own->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
    }
  }
};

IValue map_tensors(const IValue& value, const std::function<at::Tensor(const at::Tensor&)>& map) {
  if (value.isTensor()) return map(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> tensors;
    for (const at::Tensor& tensor : value.toTensorVector()) tensors.push_back(map(tensor));
    return tensors;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> tensors;
    for (const IValue& part : value.toListRef())
      tensors.push_back(part.isNone() ? std::optional<at::Tensor>() : map(part.toTensor()));
    return tensors;
  }
  if (value.isList() && !value.toListRef().empty() && value.toListRef()[0].isTensorList()) {
    c10::List<std::vector<at::Tensor>> lists;
    for (const IValue& part : value.toListRef())
      lists.push_back(map_tensors(part, map).toTensorVector());
    return lists;
  }
  if (value.isDevice() && value.toDevice().is_cuda()) return Device(c10::DeviceType::CPU);
  return value;
}

// Operations that a GPU computes with an index or a value in host memory.
const std::unordered_set<std::string> kMixes = {
    "aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index",
    "aten::_unsafe_index_put", "aten::index_put", "aten::set_", "aten::_pin_memory",
};

void compute_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string name = schema.name();
  const size_t count = schema.arguments().size(), start = stack->size() - count;
  Views views;
  bool masks = false, moves = false;
  for (size_t at = start; at < stack->size(); ++at) {
    IValue& value = (*stack)[at];
    if (kMixes.count(name) && value.isOptionalTensorList()) {
      for (const IValue& part : value.toListRef()) {
        if (part.isNone() || !part.toTensor().defined()) continue;
        const auto type = part.toTensor().scalar_type();
        masks |= type == at::kBool || type == at::kByte;
        moves |= !part.toTensor().is_cuda();
      }
    }
    value = map_tensors(value, [&](const at::Tensor& tensor) { return views.to_host(tensor); });
  }
  TORCH_CHECK(views.other_card < 0,
              "Expected all tensors to be on the same device, but found at least two devices, cuda:",
              int(views.other_card), " and cuda:", int(views.card), "! (", name, ")");
  TORCH_CHECK(!views.on_cpu.defined() || kMixes.count(name),
              "Expected all tensors to be on the same device, but found at least two devices, cuda:",
              int(views.card), " and cpu! (when checking argument of ", name, ")");
  if (name == "c10d::_allgather_base_" || name == "c10d::_reduce_scatter_base_")
    for (size_t at = start; at < start + 2; ++at)  // NCCL compares sizes, gloo compares shapes
      (*stack)[at] = (*stack)[at].toTensor().view({-1});
  if (masks || kWaits.count(name)) report_wait(name + (masks ? " with a mask" : ""));
  if (moves) report_wait(name + " with an index in host memory");
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }
  views.update();
  for (size_t at = stack->size() - schema.returns().size(); at < stack->size(); ++at) {
    IValue& value = (*stack)[at];
    if (value.isTensor() || value.isList())
      value = map_tensors(value, [&](const at::Tensor& tensor) { return views.to_card(tensor); });
  }
}

DeviceIndex card_or_current(std::optional<Device> device) {
  return device && device->has_index() ? device->index() : current_card;
}

struct OnCard {
  explicit OnCard(DeviceIndex card) : before(current_card) { current_card = card; }
  ~OnCard() { current_card = before; }
  DeviceIndex before;
};

at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>,
                 std::optional<at::MemoryFormat> format) {
  OnCard on(card_or_current(device));
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &card_allocator,
                                   c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<Device> device, std::optional<bool>) {
  OnCard on(card_or_current(device));
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &card_allocator,
      c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype));
}

at::Tensor& copy(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  const auto& host = self.is_cuda() ? source : self;
  // Collectives return host views of device tensors, as they are computed by gloo.
  const bool is_view = host.storage().data_ptr().get_deleter() == &release_owner;
  if (self.is_cuda() != source.is_cuda() && self.numel() && !is_view) {
    const char* direction = self.is_cuda() ? "copy to the GPU" : "copy to the host";
    if (!is_pinned(host.storage().data()))
      report_wait(std::string(direction) + (non_blocking ? ", not pinned" : ""));
    else if (!non_blocking)
      report_wait(std::string(direction) + ", blocking");
  }
  Views to, from;
  auto target = to.to_host(self);
  const auto origin = from.to_host(source);
  at::AutoDispatchBelowADInplaceOrView guard;
  target.copy_(origin);
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage storage, c10::SymInt offset,
                        c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  std::vector<int64_t> strides = C10_AS_INTARRAYREF_SLOW(stride).vec();
  if (strides.size() != sizes.size()) {
    strides.assign(sizes.size(), 1);
    for (int64_t at = int64_t(sizes.size()) - 2; at >= 0; --at)
      strides[at] = strides[at + 1] * std::max<int64_t>(sizes[at + 1], 1);
  }
  impl->set_sizes_and_strides(sizes, strides, offset.guard_int(__FILE__, __LINE__));
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage storage) {
  const auto count = static_cast<int64_t>(storage.nbytes() / self.dtype().itemsize());
  const std::vector<int64_t> size{count}, stride{1};
  return set_storage(self, std::move(storage), 0, c10::fromIntArrayRefSlow(size),
                     c10::fromIntArrayRefSlow(stride));
}

// A host view of `tensor` on the same memory.
at::Tensor host_view(const at::Tensor& tensor) {
  Views views;
  return views.to_host(tensor);
}

// A device tensor on the memory of `tensor`.
at::Tensor card_view(const at::Tensor& tensor, int64_t card) {
  Views views;
  views.card = static_cast<DeviceIndex>(card);
  return views.to_card(tensor);
}

// Resizes the storage of `tensor`, as torch's Python module does in builds with CUDA.
void resize_storage(const at::Tensor& tensor, int64_t bytes) {
  OnCard on(tensor.device().index());
  auto* impl = tensor.storage().unsafeGetStorageImpl();
  auto data = card_allocator.allocate(bytes);
  std::memcpy(data.get(), impl->data(), std::min<size_t>(bytes, impl->nbytes()));
  impl->set_data_ptr(std::move(data));
  impl->set_nbytes(bytes);
}

}  // namespace

// `scaled_dot_product_attention` asks this function, and not the operation, for its kernel.
const bool is_choice_set = [] {
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(
      [](const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
         const std::optional<at::Tensor>& mask, double dropout, bool causal,
         std::optional<double> scale, bool grouped) {
        return at::_fused_sdp_choice(query, key, value, mask, dropout, causal, scale, grouped);
      });
  return true;
}();

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&compute_on_host>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("copy_", TORCH_FN(copy));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage));
  m.impl("set_.source_Storage", TORCH_FN(set_whole_storage));
  m.impl("record_stream", [](at::Tensor&, c10::Stream) {});
  // Operations with a kernel for each device and a decomposition for others: a card has a kernel.
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNames()) {
    const auto op = dispatcher.findOp(name);
    const auto has = [&](c10::DispatchKey key) { return op->hasKernelForDispatchKey(key); };
    if (name.getNamespace() == "aten" && op && has(c10::DispatchKey::CPU) && !has(c10::DispatchKey::CUDA) &&
        (has(c10::DispatchKey::CompositeImplicitAutograd) || has(c10::DispatchKey::CompositeExplicitAutograd)))
      m.impl(c10::toString(name).substr(6).c_str(),
             torch::CppFunction::makeFromBoxedFunction<&compute_on_host>());
  }
}

// Collectives of "nccl" are those of gloo on the same memory.
TORCH_LIBRARY_IMPL(c10d, CUDA, m) {
  for (const char* name :
       {"broadcast_", "allreduce_", "allreduce_coalesced_", "allgather_", "_allgather_base_",
        "allgather_into_tensor_coalesced_", "reduce_scatter_", "_reduce_scatter_base_",
        "reduce_scatter_tensor_coalesced_", "reduce_", "gather_", "scatter_", "alltoall_",
        "alltoall_base_", "barrier", "send", "recv_"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&compute_on_host>());
}

TORCH_LIBRARY(gpu_sim, m) {
  m.def("host_view(Tensor(a) tensor) -> Tensor(a)");
  m.def("card_view(Tensor(a) tensor, int card) -> Tensor(a)");
  m.def("resize_storage(Tensor(a!) tensor, int bytes) -> ()");
}
TORCH_LIBRARY_IMPL(gpu_sim, CUDA, m) {
  m.impl("host_view", TORCH_FN(host_view));
  m.impl("resize_storage", TORCH_FN(resize_storage));
}
TORCH_LIBRARY_IMPL(gpu_sim, CPU, m) {
  m.impl("card_view", TORCH_FN(card_view));
  m.impl("host_view", [](const at::Tensor& tensor) { return tensor.alias(); });
}

// DistributedDataParallel measures its steps with the device's timer.
namespace c10d {
namespace {

struct CardTimer final : public Timer {
  explicit CardTimer(c10::Device) {}
  std::optional<int64_t> measureDifference(Event start, Event end) override {
    const auto from = getTimestamp(start), to = getTimestamp(end);
    return from && to ? std::optional<int64_t>(*to - *from) : std::nullopt;
  }
};

C10_REGISTER_TYPED_CLASS(TimerRegistry, kCard, CardTimer)

}  // namespace
}  // namespace c10d

// The registry builds a class by this name.
namespace at {

struct CUDAHooks final : public CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return current_card; }
  DeviceIndex getCurrentDevice() const override { return current_card; }
  DeviceIndex exchangeDevice(DeviceIndex card) const override {
    return std::exchange(current_card, card);
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex card) const override {
    return card < 0 ? current_card : std::exchange(current_card, card);
  }
  void setCurrentDevice(DeviceIndex card) const override { current_card = card; }
  DeviceIndex deviceCount() const override { return count_cards(); }
  int getNumGPUs() const override { return count_cards(); }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  Allocator* getCUDADeviceAllocator() const override { return &card_allocator; }
  Device getDeviceFromPtr(void*) const override { return Device(kCard, current_card); }
  // Draws come from the generator of the CPU, so that runs on both devices draw the same numbers.
  const Generator& getDefaultGenerator(DeviceIndex) const override {
    return at::globalContext().defaultGenerator(Device(c10::DeviceType::CPU));
  }
};

REGISTER_CUDA_HOOKS(CUDAHooks)

}  // namespace at

extern "C" {
void sim_on_wait(Callback callback) { on_wait = callback; }
void sim_on_peak(Callback callback) { on_peak = callback; }
int64_t sim_allocated(int card) { return usage[card].allocated; }
int64_t sim_reserved(int card) { return usage[card].reserved; }
int64_t sim_peak(int card) { return usage[card].peak; }
int64_t sim_capacity() { return capacity(); }
void sim_reset_peak(int card) { usage[card].peak = usage[card].allocated.load(); }
void sim_empty_cache() {
  for (auto& use : usage) use.reserved = use.allocated.load();
}
int sim_current() { return current_card; }
void sim_set_current(int card) { current_card = static_cast<DeviceIndex>(card); }
}
