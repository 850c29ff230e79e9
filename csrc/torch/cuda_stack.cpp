// Layers of one direction, one above the other, on a GPU: one after another, or as a wavefront.
//
// A wavefront cuts time into chunks. Layer l runs chunk c in diagonal l + c, beside layer l + 1 on chunk c - 1: each
// layer has a stream of its own, and a plan that takes 1 / L of the multiprocessors. The caller's stream makes the
// products between layers; it forks to a layer's stream when the layer's gx is there, and joins it before it reads the
// output:
//
//   L = 2, C = 3      diagonal   0      1      2      3
//   caller's stream           gx 0,0   gx 1,0 gx 0,1   gx 1,1 gx 0,2   gx 1,2        gx l,c: W_ih of layer l times
//   chunk c stream of layer 0            0,0          0,1          0,2 stream of layer 1                   1,0 1,1 1,2
//
// Steps one after another: (C + L - 1) T / C in the place of L T. Backward is its mirror image, from the last layer and
// chunk; dW and db are large products over all steps at the end, so it keeps the gate gradients of all layers until
// then. Compiled twice, as cuda_layer.cpp.
#include <functional>
#include <memory>

#include "cuda/chunk.h"
#include "cuda/lengths.h"
#include "cuda/side_streams.h"
#include "torch/cuda_layer.h"

namespace rnnkern {
namespace {

using cuda::Backward;
using cuda::Forward;
using Layers = std::vector<std::unique_ptr<GpuLayer>>;

// The arguments that all operators of a stack share.
struct Stack {
  std::string cell;
  Tensor x, h0;
  OptionalTensor c0;            // h0 and c0: [L, B, H]
  std::vector<Tensor> weights;  // of each layer in turn: w_ih, w_hh and perhaps b_ih, b_hh
  OptionalTensor lengths, resets;
  OptionalTensor masks;  // bool [L - 1, N, H]: what dropout keeps of each output but the last, times
  double scale;
  EngineOptions options;
  int64_t chunks;

  Stack(const std::string& cell_, const Tensor& x_, const Tensor& h0_, const OptionalTensor& c0_,
        const std::vector<Tensor>& weights_, const OptionalTensor& lengths_, const OptionalTensor& resets_,
        const OptionalTensor& masks_, double scale_, const EngineOptions& options_, int64_t chunks_)
      : cell(cell_),
        x(x_),
        h0(make_contiguous(h0_)),
        c0(make_contiguous(c0_)),
        weights(weights_),
        lengths(lengths_),
        resets(resets_),
        masks(make_contiguous(masks_)),
        scale(scale_),
        options(options_),
        chunks(chunks_),
        gpu(x_) {
    STD_TORCH_CHECK(h0.dim() == 3 && layers() > 0, "rnnkern::cuda_stack: h0 must be [L, B, H]");
    STD_TORCH_CHECK(x.dim() == 2 || x.dim() == 3, "rnnkern::cuda_stack: x must be [T, B, I] or [N, I]");
    const int64_t L = layers();
    STD_TORCH_CHECK(int64_t(weights.size()) == 2 * L || int64_t(weights.size()) == 4 * L,
                    "rnnkern::cuda_stack: weights must be 2 or 4 for each layer");
    STD_TORCH_CHECK(!c0.has_value() || c0->numel() == h0.numel(), "rnnkern::cuda_stack: c0 does not fit h0");
    STD_TORCH_CHECK(!masks.has_value() ||
                        (masks->numel() == (L - 1) * rows() * h0.size(2) && masks->scalar_type() == ScalarType::Bool),
                    "rnnkern::cuda_stack: masks must be bool [L - 1, steps, H]");
    STD_TORCH_CHECK(chunks >= 0, "rnnkern::cuda_stack: chunks must not be negative");
  }

  int64_t layers() const { return h0.size(0); }
  int64_t rows() const { return x.dim() == 2 ? x.size(0) : x.size(0) * x.size(1); }
  std::vector<int64_t> outputs() const {  // the shape of a layer's
    return x.dim() == 2 ? std::vector<int64_t>{x.size(0), h0.size(2)}
                        : std::vector<int64_t>{x.size(0), x.size(1), h0.size(2)};
  }

  // `first`: the layer 0, once there is one; lengths are brought to the GPU for it.
  std::unique_ptr<GpuLayer> layer(int64_t l, const Tensor& input, const GpuLayer* first) const {
    const size_t each = weights.size() / size_t(layers());
    std::vector<OptionalTensor> own(8);
    for (size_t i = 0; i < each; ++i) own[i] = weights[size_t(l) * each + i];
    return std::make_unique<GpuLayer>(cell, input, part(h0, l), part(c0, l), own, lengths, resets, options, first);
  }

  // Layer l's of [L, ...], with a first size of 1.
  static Tensor part(const Tensor& all, int64_t l) { return slice(all, 0, l, 1); }
  static OptionalTensor part(const OptionalTensor& all, int64_t l) {
    return all.has_value() ? OptionalTensor(part(*all, l)) : std::nullopt;
  }

  // What dropout leaves of `values`, rows first_row .. of layer l's output or its gradient.
  Tensor dropped(const Tensor& values, int64_t l, int64_t first_row) const {
    if (!masks.has_value()) return values;
    const int64_t H = h0.size(2), count = values.numel() / std::max<int64_t>(H, 1);
    const Tensor all = torch::stable::view(part(*masks, l), {rows(), H});
    const Tensor mask = torch::stable::view(slice(all, 0, first_row, count), sizes_of(values));
    return call_torch("aten::native_dropout_backward", "", values, mask, scale);
  }

  Gpu gpu;  // the device is current from here on

 private:
  static std::vector<int64_t> sizes_of(const Tensor& tensor) {
    std::vector<int64_t> sizes;
    for (int64_t d = 0; d < tensor.dim(); ++d) sizes.push_back(tensor.size(d));
    return sizes;
  }
};

// Chunks of time, the same for all layers, and what of them lies on the device.
struct Chunks {
  Chunks(GpuLayer& layer, int64_t count)
      : all(cuda::cut_steps(layer.sequence, layer.in.lengths, layer.longest, count)) {
    const int64_t storage = dtype_size(layer.in.dtype), B = layer.in.B;
    bytes = {storage, compute_size(layer.in.dtype), storage * layer.traits.gates, storage * layer.traits.saved};
    for (const cuda::Chunk& chunk : all) most_rows = std::max(most_rows, chunk.sequence.N);
    if (!layer.in.lengths) return;
    Gpu& gpu = layer.gpu;
    lengths = gpu.empty({count, B}, ScalarType::Long);
    int64_t* to = static_cast<int64_t*>(gpu.data(lengths));
    int64_t* offset = nullptr;
    if (layer.in.packed_rows) {
      offsets = gpu.empty({layer.longest + count}, ScalarType::Long);
      offset = static_cast<int64_t*>(gpu.data(offsets));
    }
    for (cuda::Chunk& chunk : all) {
      cuda::place_lengths(cuda::lengths_in(chunk, layer.in.lengths).data(), B, to, gpu.stream());
      chunk.sequence.lengths = to;
      to += B;
      if (!offset) continue;
      cuda::place_offsets(chunk.sequence.lengths, B, chunk.sequence.T, offset, gpu.stream());
      chunk.sequence.offsets = offset;
      offset += chunk.sequence.T + 1;
    }
  }

  std::vector<cuda::Chunk> all;
  cuda::UnitBytes bytes{};
  int64_t most_rows = 0;
  OptionalTensor lengths, offsets;  // [C, B]; [T_c + 1] of each chunk in turn
};

Tensor rows_of(const Tensor& all, const cuda::Chunk& chunk) { return slice(all, 0, chunk.first_row, chunk.sequence.N); }

// Calls visit(layer, chunk) for the first layer and chunk, then diagonal by diagonal, the later layers first: what they
// wait for was launched in the diagonal before.
void for_each_diagonal(int64_t layers, int64_t chunks, const std::function<void(int64_t, int64_t)>& visit) {
  for (int64_t diagonal = 0; diagonal < layers + chunks - 1; ++diagonal) {
    for (int64_t l = std::min(diagonal, layers - 1); l >= 0 && diagonal - l < chunks; --l) visit(l, diagonal - l);
  }
}

void forward_wavefront(const Stack& stack, Layers& layers, const cuda::StackChoice& choice,
                       const std::vector<LayerResults>& out) {
  const int L = int(stack.layers());
  for (int l = 1; l < L; ++l) layers.push_back(stack.layer(l, out[size_t(l - 1)].y, layers[0].get()));
  const Chunks chunks(*layers[0], choice.chunks);
  std::vector<Forward<void, void>> whole;
  std::vector<Tensor> gx, workspaces, transposed;  // gx of one chunk: the next is made when this one has run
  for (int l = 0; l < L; ++l) {
    GpuLayer& layer = *layers[size_t(l)];
    whole.push_back(forward_arguments(layer, out[size_t(l)]));
    gx.push_back(layer.gpu.empty({chunks.most_rows, layer.gates}, layer.in.dtype));
    workspaces.push_back(layer.workspace(choice.engine));
    transposed.push_back(torch::stable::transpose(*layer.weight(0, 0), 0, 1));
  }
  cuda::SideStreams side(stack.gpu.stream(), L);
  for_each_diagonal(L, choice.chunks, [&](int64_t l, int64_t c) {
    GpuLayer& layer = *layers[size_t(l)];
    const cuda::Chunk& chunk = chunks.all[size_t(c)];
    if (l > 0) side.join(int(l - 1));
    side.join(int(l));  // of the last layer; the layer above has joined any other
    const Tensor input = rows_of(layer.flat(layer.input, layer.in.I), chunk);
    const Tensor gx_rows = slice(gx[size_t(l)], 0, 0, chunk.sequence.N);
    multiply(gx_rows, l > 0 ? stack.dropped(input, l - 1, chunk.first_row) : input, transposed[size_t(l)]);
    Forward<void, void> forward = part_of(whole[size_t(l)], chunk, chunks.bytes);
    forward.gx = layer.gpu.data(gx_rows);
    void* const workspace = layer.gpu.data(workspaces[size_t(l)]);
    side.run(int(l), [&layer, &choice, forward, workspace](void* stream) {
      const cuda::EngineChoice& e = choice.engine;
      layer.launchers.persistent.forward(*e.plan, e.engine, e.product, forward, workspace, stream);
    });
  });
  side.join();
}

void run_stack(const Stack& stack, const std::vector<LayerResults>& out, Layers layers) {
  const cuda::StackChoice choice =
      cuda::choose_stack(layers[0]->request(cuda::Pass::forward), stack.layers(), stack.chunks);
  if (choice.chunks > 0) {
    forward_wavefront(stack, layers, choice, out);
    return;
  }
  run_forward(*layers[0], out[0]);
  for (int64_t l = 1; l < stack.layers(); ++l)
    run_forward(*stack.layer(l, stack.dropped(out[size_t(l - 1)].y, l - 1, 0), layers[0].get()), out[size_t(l)]);
}

struct StackResults {
  Tensor y, h_n, c_n;
  Tensor hidden;  // [L - 1, N, H] as y's steps are: the outputs of the layers below, before dropout
  Tensor saved;   // [L, what a layer keeps]
};

// [count, sizes...]
std::vector<int64_t> times(int64_t count, std::vector<int64_t> sizes) {
  sizes.insert(sizes.begin(), count);
  return sizes;
}

Tensor hidden_of(const Stack& stack, const Tensor& hidden, int64_t l) {
  return torch::stable::view(Stack::part(hidden, l), stack.outputs());
}
Tensor saved_of(const Tensor& saved, int64_t l) { return torch::stable::view(Stack::part(saved, l), {saved.size(1)}); }

StackResults run_forward(Stack& stack, bool save) {
  const int64_t L = stack.layers();
  Layers layers;
  layers.push_back(stack.layer(0, stack.x, nullptr));
  const GpuLayer& first = *layers[0];
  const Dtype dtype = first.in.dtype, compute = compute_dtype(dtype);
  const std::vector<int64_t> none = {0}, states = {L, first.in.B, first.in.H};
  const bool two_states = stack.c0.has_value();
  Gpu& gpu = stack.gpu;
  const StackResults all{gpu.empty(stack.outputs(), dtype), gpu.empty(states, dtype),
                         gpu.empty(two_states ? states : none, compute),
                         gpu.empty(times(L - 1, stack.outputs()), dtype),
                         gpu.empty(save ? std::vector<int64_t>{L, first.saved_elements()} : none, compute)};
  std::vector<LayerResults> out;
  for (int64_t l = 0; l < L; ++l)
    out.push_back({l < L - 1 ? hidden_of(stack, all.hidden, l) : all.y, Stack::part(all.h_n, l),
                   two_states ? Stack::part(all.c_n, l) : all.c_n, gpu.empty(none, compute),
                   save ? saved_of(all.saved, l) : all.saved});
  run_stack(stack, out, std::move(layers));
  return all;
}

// What backward is given for each layer, and gives.
struct StackGradients {
  std::vector<OutputGradients> out;  // dy of the last alone, until the others are known
  std::vector<Tensor> y, saved, dh0, dc0;
  double clip;
  bool need_dx, need_dw;
  Tensor dx;
  std::vector<Tensor> dweights;

  void add_weights(GpuLayer& layer, const Tensor& input, const GateGradients& gates, size_t each, int64_t l) {
    const std::vector<Tensor> dw = weight_gradients(layer, input, gates, need_dw);
    for (size_t i = 0; i < each; ++i) dweights[size_t(l) * each + i] = dw[i];
  }
};

void backward_wavefront(const Stack& stack, Layers& layers, const cuda::StackChoice& choice, StackGradients& g) {
  const int64_t L = stack.layers(), C = choice.chunks;
  for (int64_t l = 1; l < L; ++l) layers.push_back(stack.layer(l, g.y[size_t(l - 1)], layers[0].get()));
  const Chunks chunks(*layers[0], C);
  std::vector<GateGradients> gates;
  std::vector<Backward<void, void>> whole;
  std::vector<Tensor> workspaces;
  std::vector<Tensor> dy;  // kept until all have run, as whatever side streams read
  for (int64_t at = 0; at < L; ++at) {
    const size_t l = size_t(at);
    GpuLayer& layer = *layers[l];
    gates.push_back(make_gate_gradients(layer));
    whole.push_back(backward_arguments(layer, g.out[l], g.y[l], g.saved[l], g.clip, gates.back(), g.dh0[l], g.dc0[l]));
    workspaces.push_back(layer.workspace(choice.engine));
  }
  cuda::SideStreams side(stack.gpu.stream(), int(L));
  for_each_diagonal(L, C, [&](int64_t from_last, int64_t from_end) {
    const int64_t l = L - 1 - from_last;
    GpuLayer& layer = *layers[size_t(l)];
    const cuda::Chunk& chunk = chunks.all[size_t(C - 1 - from_end)];
    Backward<void, void> backward = part_of(whole[size_t(l)], chunk, chunks.bytes);
    if (l < L - 1) {
      side.join(int(l + 1));
      const Tensor product = layer.gpu.empty({chunk.sequence.N, layer.in.H}, layer.in.dtype);
      multiply(product, rows_of(gates[size_t(l + 1)].dgx, chunk), *layers[size_t(l + 1)]->weight(0, 0));
      dy.push_back(stack.dropped(product, l, chunk.first_row));
      backward.dy = layer.gpu.data(dy.back());
    }
    void* const workspace = layer.gpu.data(workspaces[size_t(l)]);
    side.run(int(l), [&layer, &choice, backward, workspace](void* stream) {
      const cuda::EngineChoice& e = choice.engine;
      layer.launchers.persistent.backward(*e.plan, e.engine, e.product, backward, workspace, stream);
    });
  });
  side.join();
  g.dx = input_gradient(*layers[0], gates[0], g.need_dx);
  for (int64_t l = 0; l < L; ++l) {
    GpuLayer& layer = *layers[size_t(l)];
    const Tensor input = l > 0 && g.need_dw ? stack.dropped(layer.input, l - 1, 0) : layer.input;
    g.add_weights(layer, input, gates[size_t(l)], stack.weights.size() / size_t(L), l);
  }
}

void backward_in_turn(const Stack& stack, std::unique_ptr<GpuLayer> first, StackGradients& g) {
  const int64_t L = stack.layers();
  for (int64_t at = L - 1; at >= 0; --at) {
    const size_t l = size_t(at);
    const std::unique_ptr<GpuLayer> layer =
        at > 0 ? stack.layer(at, stack.dropped(g.y[l - 1], at - 1, 0), first.get()) : std::move(first);
    const GateGradients gates = run_backward(*layer, g.out[l], g.y[l], g.saved[l], g.clip, g.dh0[l], g.dc0[l]);
    const Tensor dx = input_gradient(*layer, gates, at > 0 || g.need_dx);
    g.add_weights(*layer, layer->input, gates, stack.weights.size() / size_t(L), at);
    if (at > 0)
      g.out[l - 1].dy = stack.dropped(dx, at - 1, 0);
    else
      g.dx = dx;
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cuda_stack(std::string cell, Tensor x, Tensor h0, OptionalTensor c0,
                                                              std::vector<Tensor> weights, OptionalTensor lengths,
                                                              OptionalTensor resets, OptionalTensor masks, double scale,
                                                              [[maybe_unused]] double grad_clip, std::string engine,
                                                              bool tf32, int64_t chunks) {
  Stack stack(cell, x, h0, c0, weights, lengths, resets, masks, scale, {engine, tf32}, chunks);
  const StackResults out = run_forward(stack, true);
  return {out.y, out.h_n, out.c_n, out.hidden, out.saved};
}

std::tuple<Tensor, Tensor, Tensor> cuda_stack_inference(std::string cell, Tensor x, Tensor h0, OptionalTensor c0,
                                                        std::vector<Tensor> weights, OptionalTensor lengths,
                                                        OptionalTensor resets, OptionalTensor masks, double scale,
                                                        std::string engine, bool tf32, int64_t chunks) {
  Stack stack(cell, x, h0, c0, weights, lengths, resets, masks, scale, {engine, tf32}, chunks);
  const StackResults out = run_forward(stack, false);
  return {out.y, out.h_n, out.c_n};
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> cuda_stack_backward(
    std::string cell, OptionalTensor dy, OptionalTensor dh_n, OptionalTensor dc_n, Tensor x, Tensor h0,
    OptionalTensor c0, std::vector<Tensor> weights, OptionalTensor lengths, OptionalTensor resets, OptionalTensor masks,
    double scale, Tensor y, Tensor hidden, Tensor saved, bool need_dx, bool need_dh0, bool need_dw, double grad_clip,
    std::string engine, bool tf32, int64_t chunks) {
  Stack stack(cell, x, h0, c0, weights, lengths, resets, masks, scale, {engine, tf32}, chunks);
  const int64_t L = stack.layers();
  Layers layers;
  layers.push_back(stack.layer(0, x, nullptr));
  const GpuLayer& first = *layers[0];
  const Dtype dtype = first.in.dtype, compute = compute_dtype(dtype);
  const auto fits = [](const OptionalTensor& tensor, int64_t count, Dtype expected) {
    return !tensor.has_value() || (tensor->numel() == count && dtype_of(*tensor) == expected);
  };
  const int64_t outputs = stack.rows() * first.in.H;
  STD_TORCH_CHECK(
      fits(dy, outputs, dtype) && fits(dh_n, stack.h0.numel(), dtype) && fits(dc_n, stack.h0.numel(), compute),
      "rnnkern::cuda_stack_backward: a gradient does not have the shape and dtype of its output");
  STD_TORCH_CHECK(fits(y, outputs, dtype) && fits(hidden, (L - 1) * outputs, dtype) &&
                      fits(saved, L * first.saved_elements(), compute) && saved.dim() == 2,
                  "rnnkern::cuda_stack_backward: y, hidden and saved must be those of the forward call");
  y = make_contiguous(y);
  hidden = make_contiguous(hidden);
  saved = make_contiguous(saved);
  dh_n = make_contiguous(dh_n);
  dc_n = make_contiguous(dc_n);

  const std::vector<int64_t> none = {0}, states = {L, first.in.B, first.in.H};
  Tensor dh0 = stack.gpu.empty(states, compute), dc0 = stack.gpu.empty(c0.has_value() ? states : none, compute);
  StackGradients g{{}, {}, {}, {}, {}, grad_clip, need_dx, need_dw, dh0, weights};
  for (int64_t l = 0; l < L; ++l) {
    g.out.push_back(
        {l == L - 1 ? make_contiguous(dy) : std::nullopt, Stack::part(dh_n, l), Stack::part(dc_n, l), std::nullopt});
    g.y.push_back(l < L - 1 ? hidden_of(stack, hidden, l) : y);
    g.saved.push_back(saved_of(saved, l));
    g.dh0.push_back(Stack::part(dh0, l));
    g.dc0.push_back(c0.has_value() ? Stack::part(dc0, l) : dc0);
  }
  const cuda::StackChoice choice = cuda::choose_stack(first.request(cuda::Pass::backward), L, chunks);
  if (choice.chunks > 0)
    backward_wavefront(stack, layers, choice, g);
  else
    backward_in_turn(stack, std::move(layers[0]), g);
  if (!need_dh0) dh0 = dc0 = stack.gpu.empty(none, compute);
  if (compute != dtype) dh0 = torch::stable::to(dh0, Gpu::scalar_type_of(dtype));
  return {g.dx, dh0, dc0, g.dweights};
}

std::string cuda_stack_plan(std::string cell, Tensor x, Tensor h0, OptionalTensor lengths, std::string engine,
                            bool tf32, int64_t chunks, bool backward) {
  const Gpu gpu(x);
  cuda::EngineRequest request = request_of(cell, x, h0, lengths, {engine, tf32}, backward);
  request.D = 1;
  return cuda::choose_stack(request, h0.size(0), chunks).describe();
}

STABLE_TORCH_LIBRARY_IMPL(rnnkern, RNNKERN_GPU_KEY, m) {
  m.impl("cuda_stack", TORCH_BOX(&cuda_stack));
  m.impl("cuda_stack_inference", TORCH_BOX(&cuda_stack_inference));
  m.impl("cuda_stack_backward", TORCH_BOX(&cuda_stack_backward));
  m.impl("cuda_stack_plan", TORCH_BOX(&cuda_stack_plan));
}

}  // namespace
}  // namespace rnnkern
