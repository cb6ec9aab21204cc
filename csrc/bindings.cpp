// The Python module sage_kernels._C: the four steps of a call (kernels.h), on addresses and strides. It knows no torch.
//
// sage_kernels/cuda.py is its only caller, but whatever is passed, the answer to nonsense is a sentence and not a crash.

#include <pybind11/pybind11.h>

#include <climits>
#include <algorithm>
#include <cmath>
#include <iterator>
#include <sstream>
#include <tuple>
#include <vector>

#include "build_info.h"  // SAGE_ARCHS "8.0,9.0" and SAGE_SOURCE_HASH; build.py writes it
#include "check.h"
#include "kernels.h"

namespace py = pybind11;

namespace sage {
namespace {

constexpr const char* MODES[] = {"fp16/fp32", "fp16/fp16+fp32", "fp16/fp16", "int8/int32",
                                 "fp8/fp32+fp32", "fp8/fp32+fp16", "fp8/fp32"};
static_assert(std::size(MODES) == size_t(Mode::count));
constexpr const char* DTYPES[] = {"float16", "bfloat16", "float32"};
constexpr const char* MASK_KINDS[] = {"none", "bool", "float16", "bfloat16", "float32"};

template <class... Part> [[noreturn]] void fail(const Part&... part) {
    std::ostringstream text;
    (text << ... << part);
    throw std::invalid_argument(text.str());
}

std::string quoted(py::handle x) { return py::repr(x).cast<std::string>(); }

// The index of `given` in `names`.
template <size_t N> int index_of(const char* what, const std::string& given, const char* const (&names)[N]) {
    std::string all;
    for (size_t i = 0; i < N; ++i) {
        if (given == names[i]) return int(i);
        all += (i ? ", " : "") + std::string(names[i]);
    }
    fail(what, " is '", given, "'; it must be one of ", all);
}

// ---- architectures: compute capability times ten

struct Compiled {
    int arch;
    bool ptx;  // the driver of a newer GPU can compile it, too
};

// Of names such as 8.9 and 8.0+PTX.
const std::vector<Compiled>& compiled() {
    static const std::vector<Compiled> all = [] {
        std::vector<Compiled> archs;
        std::istringstream list(SAGE_ARCHS);
        for (std::string name; std::getline(list, name, ',');)
            archs.push_back({int(std::lround(std::stod(name) * 10)), name.find("+PTX") != std::string::npos});
        return archs;
    }();
    return all;
}

std::string arch_name(int arch) { return std::to_string(arch / 10) + "." + std::to_string(arch % 10); }

int arch_named(const std::string& name) {
    for (const Compiled& c : compiled())
        if (arch_name(c.arch) == name) return c.arch;
    fail("arch is '", name, "'; this binary has ", SAGE_ARCHS);
}

// What a GPU of compute capability major.minor runs, 0 if nothing: its major version's with the largest minor up to its own, else
// the newest that the driver can compile for it.
int arch_for(int major, int minor) {
    int own = 0, ptx = 0;
    for (const Compiled& c : compiled()) {
        if (c.arch / 10 == major && c.arch % 10 <= minor) own = std::max(own, c.arch);
        if (c.ptx && c.arch <= major * 10 + minor) ptx = std::max(ptx, c.arch);
    }
    return own ? own : ptx;
}

int device_count() {
    int count = 0;
    if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
    cudaGetLastError();  // no driver or no GPU: none is counted
    return 0;
}

int capability(int device, const Call& call) {
    int major = 0, minor = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute", call);
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute", call);
    return major * 10 + minor;
}

int arch_of(int device, const Call& call) {
    const int count = device_count();
    if (device >= count) fail("device is ", device, "; CUDA devices here: ", count);
    const int own = capability(device, call), arch = arch_for(own / 10, own % 10);
    if (!arch)
        fail("device ", device, " has compute capability ", arch_name(own), "; this binary has kernels for ", SAGE_ARCHS);
    return arch;
}

// wgmma is of 9.0 alone, and not in PTX that is compiled for another.
bool runs_wgmma(int device, const Call& call) {
    for (const Compiled& c : compiled())
        if (c.arch == 90) return device < device_count() && capability(device, call) == 90;
    return false;
}

// ---- a call

struct DeviceCall {
    Call call;
    int device;
    cudaStream_t stream;
};

// The keywords of Call(...), each taken once; what is missing, left over or out of range is a sentence that names it.
class Keywords {
   public:
    explicit Keywords(py::dict given) : left_(given.attr("copy")()) {}

    int64_t integer(const char* name, int64_t low, int64_t high) {
        const py::object given = take(name);
        int overflow = 0;
        if (py::isinstance<py::int_>(given)) {
            const long long value = PyLong_AsLongLongAndOverflow(given.ptr(), &overflow);
            if (!overflow && value >= low && value <= high) return value;
        }
        fail(name, " is ", quoted(given), "; it must be an integer, ", low, " to ", high);
    }
    int size(const char* name, int high) { return int(integer(name, 1, high)); }
    bool has(const char* name) const { return left_.contains(name); }
    bool flag(const char* name) { return integer(name, 0, 1) != 0; }
    template <class T> T address(const char* name) { return reinterpret_cast<T>(integer(name, 0, INT64_MAX)); }
    float number(const char* name) {
        const py::object given = take(name);
        if (py::isinstance<py::float_>(given) || py::isinstance<py::int_>(given)) {
            const float value = float(PyFloat_AsDouble(given.ptr()));
            if (!PyErr_Occurred() && std::isfinite(value)) return value;
            PyErr_Clear();  // an int that no double holds
        }
        fail(name, " is ", quoted(given), "; it must be a finite number");
    }
    template <class E, size_t N> E one_of(const char* name, const char* const (&names)[N]) {
        return E(index_of(name, py::str(take(name)).cast<std::string>(), names));
    }
    void done() {
        for (auto item : left_) fail("Call has no ", quoted(item.first));
    }

   private:
    py::object take(const char* name) {
        if (!left_.contains(name)) fail(name, " is missing");
        return left_.attr("pop")(name);
    }
    py::dict left_;
};

constexpr int padded_head_dim(int d) { return d <= 64 ? 64 : d <= 128 ? 128 : 256; }
constexpr int padded_v_dim(int d) { return d > 64 && d <= 96 ? 96 : padded_head_dim(d); }
int most_splits(const Call& c) { return c.nk > MOST_SPLITS * PANEL ? MOST_SPLITS : (c.nk + PANEL - 1) / PANEL; }

DeviceCall make_call(const py::kwargs& given) {
    Keywords take(given);
    DeviceCall made{};
    Call& c = made.call;
    c.batch = take.size("batch", INT_MAX);
    c.heads = take.size("heads", INT_MAX);
    c.kv_heads = take.size("kv_heads", INT_MAX);
    if (c.heads % c.kv_heads) fail("heads is ", c.heads, "; it must be a multiple of kv_heads, ", c.kv_heads);
    c.nq = take.size("nq", INT_MAX - BLOCK);
    c.nk = take.size("nk", INT_MAX - BLOCK);
    c.head_dim = take.size("head_dim", 256);
    c.dim = take.size("dim", 256);
    c.v_dim = take.size("v_dim", 256);
    const int dim = padded_head_dim(c.head_dim), v_dim = padded_v_dim(c.head_dim);
    if (c.dim != dim) fail("dim is ", c.dim, "; for head_dim ", c.head_dim, " it must be ", dim);
    if (c.v_dim != v_dim) fail("v_dim is ", c.v_dim, "; for head_dim ", c.head_dim, " it must be ", v_dim);
    if (double(c.q_rows()) * c.q_padded() * dim > MOST_ELEMENTS || double(c.kv_rows()) * c.k_padded() * dim > MOST_ELEMENTS)
        fail("the call is larger than any memory: ", describe(c));
    c.mode = take.one_of<Mode>("mode", MODES);
    c.dtype = take.one_of<DType>("dtype", DTYPES);
    c.q_block = take.size("q_block", BLOCK);
    c.q_sub = take.size("q_sub", BLOCK);
    c.k_sub = take.size("k_sub", PANEL);
    const auto groups = std::make_tuple(c.q_block, c.q_sub, c.k_sub);
    if (groups != std::make_tuple(128, 1, 1) && groups != std::make_tuple(16, 1, 1) && groups != std::make_tuple(16, 8, 4))
        fail("(q_block, q_sub, k_sub) is (", c.q_block, ", ", c.q_sub, ", ", c.k_sub,
             "); it must be (128, 1, 1), (16, 1, 1) or (16, 8, 4)");
    c.is_causal = take.flag("is_causal");
    c.smooth_k = take.flag("smooth_k");
    c.smooth_v = take.flag("smooth_v");
    c.rotate = take.flag("rotate");
    c.return_lse = take.flag("return_lse");
    c.sm_scale = take.number("sm_scale");
    c.q_factor = take.number("q_factor");
    c.v_max = take.number("v_max");
    if (c.v_max <= 0) fail("v_max is ", c.v_max, "; it must be above 0");
    c.p_max_log2 = take.number("p_max_log2");
    c.cu_q = take.address<const int32_t*>("cu_q");
    c.cu_k = take.address<const int32_t*>("cu_k");
    if (!c.cu_q != !c.cu_k) fail("cu_", c.cu_q ? "k" : "q", " is 0; packed sequences need both cu_q and cu_k");
    c.splits = take.size("splits", most_splits(c));
    made.device = int(take.integer("device", 0, INT_MAX));
    made.stream = take.address<cudaStream_t>("stream");
    const bool able = has_wgmma(c.mode, c.dim, c.v_dim), asked = take.has("wgmma");
    c.wgmma = asked ? take.flag("wgmma") : able && runs_wgmma(made.device, c);
    // 128 keys' products are summed in fp16 before they are flushed, twice what mma.sync sums: P is half as large
    if (c.wgmma && c.mode == Mode::fp8_fp32_fp16) c.p_max_log2 -= 1.0f;
    if (c.wgmma && !able)
        fail("wgmma is 1; there is no kernel with it for ", MODES[int(c.mode)], " at head_dim ", c.head_dim);
    take.done();
    return made;
}

void set_splits(DeviceCall& c, int splits) {
    if (splits < 1 || splits > most_splits(c.call))
        fail("splits is ", splits, "; it must be 1 to ", most_splits(c.call), " for ", describe(c.call));
    c.call.splits = splits;
}

py::tuple scratch_bytes(const DeviceCall& c) {
    const Call& call = c.call;
    return py::make_tuple(Stats::carve(call, nullptr).bytes, QCodes::carve(call, nullptr).bytes,
                          KCodes::carve(call, nullptr).bytes, VCodes::carve(call, nullptr).bytes,
                          Partials::carve(call, nullptr).bytes);
}

// ---- tensors

using GivenView = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;  // address, strides of batch, head, token
using GivenMask = std::tuple<std::string, uintptr_t, int64_t, int64_t, int64_t, int64_t>;

int64_t stride(const char* name, int64_t given) {
    if (given < 0) fail(name, " has a stride of ", given, "; strides must not be negative");
    return given;
}

View view(const char* name, const GivenView& given) {
    const auto [data, b, h, n] = given;
    if (!data) fail(name, " is at address 0");
    return {reinterpret_cast<void*>(data), stride(name, b), stride(name, h), stride(name, n)};
}

Mask mask_of(const py::object& given) {
    if (given.is_none()) return {MaskKind::none, nullptr, 0, 0, 0, 0};
    py::detail::make_caster<GivenMask> caster;
    if (!caster.load(given, true))
        fail("mask is ", quoted(given), "; it must be None or (kind, address, and strides of batch, head, query, key)");
    const auto [kind, data, b, h, q, k] = py::detail::cast_op<GivenMask>(std::move(caster));
    if (!data) fail("mask is at address 0");
    return {MaskKind(index_of("mask kind", kind, MASK_KINDS)), reinterpret_cast<const void*>(data),
            stride("mask", b), stride("mask", h), stride("mask", q), stride("mask", k)};
}

// One of the five parts of the scratch memory, carved.
template <class Part> Part scratch(const char* name, const Call& call, uintptr_t address) {
    const Part part = Part::carve(call, reinterpret_cast<void*>(address));
    if (part.bytes && !address) fail(name, " is at address 0; it must have ", part.bytes, " bytes");
    if (address % SCRATCH_ALIGNMENT) fail(name, " is at an address that is no multiple of ", SCRATCH_ALIGNMENT);
    return part;
}

float* lse_of(const Call& call, uintptr_t address) {
    if (call.return_lse && !address) fail("lse is at address 0, and return_lse was asked for");
    return call.return_lse ? reinterpret_cast<float*>(address) : nullptr;
}

// ---- the steps

// Makes the call's device current, after checking that this binary can run the call there. Other Python threads run meanwhile,
// so a step has read its Python objects before.
struct On : private py::gil_scoped_release, private DeviceGuard {
    explicit On(const DeviceCall& c) : DeviceGuard(runnable(c), c.call) {}

    static int runnable(const DeviceCall& c) {
        const int arch = arch_of(c.device, c.call);
        if (!has_mode(c.call.mode, arch))
            fail("mode is ", MODES[int(c.call.mode)], "; kernels of compute capability ", arch_name(arch), " do not have it");
        return c.device;
    }
};

void stats(const DeviceCall& c, const GivenView& k, const GivenView& v, uintptr_t known) {
    const View k_view = view("k", k), v_view = view("v", v);
    const Stats to = scratch<Stats>("stats", c.call, known);
    const On device(c);
    launch_stats(c.call, k_view, v_view, to, c.stream);
}

void quantize(const DeviceCall& c, int parts, const GivenView& q, const GivenView& k, const GivenView& v, uintptr_t known,
              uintptr_t q_codes, uintptr_t k_codes, uintptr_t v_codes) {
    if (parts < 1 || parts > (PART_Q | PART_K | PART_V)) fail("parts is ", parts, "; it must be a sum of PART_Q, PART_K, PART_V");
    // Of a part that is not asked for, nothing is read: its tensor may be gone.
    const View q_view = parts & PART_Q ? view("q", q) : View{}, k_view = parts & PART_K ? view("k", k) : View{},
               v_view = parts & PART_V ? view("v", v) : View{};
    const Stats from = scratch<Stats>("stats", c.call, known);
    const QCodes q_to = parts & PART_Q ? scratch<QCodes>("q_codes", c.call, q_codes) : QCodes{};
    const KCodes k_to = parts & PART_K ? scratch<KCodes>("k_codes", c.call, k_codes) : KCodes{};
    const VCodes v_to = parts & PART_V ? scratch<VCodes>("v_codes", c.call, v_codes) : VCodes{};
    const On device(c);
    launch_quantize(c.call, parts, q_view, k_view, v_view, from, q_to, k_to, v_to, c.stream);
}

void exact(const DeviceCall& c, const GivenView& q, const GivenView& k, const GivenView& v, const py::object& mask,
           uintptr_t known, const GivenView& out, uintptr_t lse) {
    const View q_view = view("q", q), k_view = view("k", k), v_view = view("v", v), out_view = view("out", out);
    const Mask hidden = mask_of(mask);
    const Stats from = scratch<Stats>("stats", c.call, known);
    float* const lse_to = lse_of(c.call, lse);
    const On device(c);
    launch_exact(c.call, q_view, k_view, v_view, hidden, from.bad, out_view, lse_to, c.stream);
}

void attention(const DeviceCall& c, uintptr_t known, uintptr_t q_codes, uintptr_t k_codes, uintptr_t v_codes,
               const py::object& mask, uintptr_t partials, const GivenView& out, uintptr_t lse) {
    const Stats from = scratch<Stats>("stats", c.call, known);
    const QCodes q = scratch<QCodes>("q_codes", c.call, q_codes);
    const KCodes k = scratch<KCodes>("k_codes", c.call, k_codes);
    const VCodes v = scratch<VCodes>("v_codes", c.call, v_codes);
    const Partials parts = scratch<Partials>("partials", c.call, partials);
    const Mask hidden = mask_of(mask);
    const View out_view = view("out", out);
    float* const lse_to = lse_of(c.call, lse);
    const On device(c);
    if (c.call.wgmma && !runs_wgmma(c.device, c.call))
        fail("wgmma is 1; device ", c.device, " or this binary, with kernels for ", SAGE_ARCHS, ", does not have it");
    launch_attention(c.call, q, k, v, from, hidden, parts, out_view, lse_to, c.stream);
}

// ---- what the binary is

int driver_version() {
    int version = 0;
    if (cudaDriverGetVersion(&version) != cudaSuccess) cudaGetLastError();
    return version;
}

py::tuple modes(const std::string& arch) {
    py::list found;
    for (size_t i = 0; i < std::size(MODES); ++i)
        if (has_mode(Mode(i), arch_named(arch))) found.append(MODES[i]);
    return py::tuple(found);
}

int key_tile_of(const std::string& mode, int head_dim, const std::string& arch) {
    if (head_dim < 1 || head_dim > 256) fail("head_dim is ", head_dim, "; it must be 1 to 256");
    return key_tile(Mode(index_of("mode", mode, MODES)), padded_head_dim(head_dim), padded_v_dim(head_dim), arch_named(arch));
}

}  // namespace
}  // namespace sage

PYBIND11_MODULE(_C, m) {
    using namespace sage;
    py::list archs;
    for (const Compiled& c : compiled()) archs.append(arch_name(c.arch));
    m.attr("ARCHS") = py::tuple(archs);
    m.def("arch_for", [](int major, int minor) {
        const int arch = arch_for(major, minor);
        return arch ? arch_name(arch) : std::string();
    }, py::arg("major"), py::arg("minor"));
    m.attr("SOURCE_HASH") = SAGE_SOURCE_HASH;
    m.attr("CUDA_RUNTIME") = CUDART_VERSION;
    m.attr("LARGEST") = LARGEST;
    m.attr("TINY") = TINY;
    m.attr("LOG2E") = LOG2E;
    m.attr("MASK_LIMIT") = MASK_LIMIT;
    m.attr("EXACT_P_MAX") = EXACT_P_MAX;
    m.attr("HASH") = HASH;
    m.attr("BLOCK") = BLOCK;
    m.attr("PANEL") = PANEL;
    m.attr("WGMMA_KEYS") = WGMMA_KEYS;
    m.attr("PART_Q") = int(PART_Q);
    m.attr("PART_K") = int(PART_K);
    m.attr("PART_V") = int(PART_V);

    py::class_<DeviceCall>(m, "Call")
        .def(py::init(&make_call))
        .def_property("splits", [](const DeviceCall& c) { return c.call.splits; }, &set_splits)
        .def_property_readonly("wgmma", [](const DeviceCall& c) { return c.call.wgmma; })
        .def("bytes", &scratch_bytes)
        .def("__repr__", [](const DeviceCall& c) { return "Call(" + describe(c.call) + ", " + MODES[int(c.call.mode)] + ")"; });

    m.def("driver_version", &driver_version);
    m.def("modes", &modes, py::arg("arch"));
    m.def("key_tile", &key_tile_of, py::arg("mode"), py::arg("head_dim"), py::arg("arch"));
    m.def("choose_splits", [](const DeviceCall& c, int multiprocessors, const std::string& arch) {
        if (multiprocessors < 1) fail("multiprocessors is ", multiprocessors, "; it must be at least 1");
        return choose_splits(c.call, multiprocessors, arch_named(arch));
    }, py::arg("call"), py::arg("multiprocessors"), py::arg("arch"));
    // A tensor is (address, and strides of batch, head, token in elements), its memory an address.
    m.def("stats", &stats, py::arg("call"), py::arg("k"), py::arg("v"), py::arg("stats"));
    m.def("quantize", &quantize, py::arg("call"), py::arg("parts"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("stats"),
          py::arg("q_codes"), py::arg("k_codes"), py::arg("v_codes"));
    m.def("exact", &exact, py::arg("call"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("mask"), py::arg("stats"),
          py::arg("out"), py::arg("lse"));
    m.def("attention", &attention, py::arg("call"), py::arg("stats"), py::arg("q_codes"), py::arg("k_codes"),
          py::arg("v_codes"), py::arg("mask"), py::arg("partials"), py::arg("out"), py::arg("lse"));
}
