// What a CPU build of torch lacks to let autograd run over fake tensors "on cuda": someone who
// answers for streams, events and devices of that type. There is no GPU, so every answer is empty.
// SIMULATED_CARDS says how many devices there are (1 where it is not set).

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstdlib>

namespace {

constexpr auto kCard = c10::DeviceType::CUDA;

c10::DeviceIndex count_cards() {
  const char* wish = std::getenv("SIMULATED_CARDS");
  return static_cast<c10::DeviceIndex>(wish ? std::atoi(wish) : 1);
}

c10::Device first_card() { return c10::Device(kCard, 0); }

c10::Stream only_stream() { return c10::Stream(c10::Stream::DEFAULT, first_card()); }

struct NoGpuGuard final : public c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = kCard;

  c10::DeviceType type() const override { return kCard; }
  c10::DeviceIndex deviceCount() const noexcept override { return count_cards(); }
  c10::Device getDevice() const override { return first_card(); }
  c10::Device exchangeDevice(c10::Device) const override { return first_card(); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}

  c10::Stream getStream(c10::Device) const noexcept override { return only_stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return only_stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return only_stream(); }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}

  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag)
      const override {
    static char some_event;
    *event = &some_event;
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void synchronizeEvent(void*) const override {}
};

}  // namespace

C10_REGISTER_GUARD_IMPL(CUDA, NoGpuGuard)

// The registry builds a class by this name.
namespace at {

struct CUDAHooks final : public CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex deviceCount() const override { return count_cards(); }
};

REGISTER_CUDA_HOOKS(CUDAHooks)

}  // namespace at
