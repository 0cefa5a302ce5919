// Greedy generation from a shadowc artifact without Python: build/generate ARTIFACT 51,91,20 32
#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <fcntl.h>
#include <openssl/evp.h>
#include <sys/mman.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstring>
#include <filesystem>
#include <iostream>
#include <regex>
#include <sstream>

using torch::inductor::AOTIModelPackageLoader;
using Path = std::filesystem::path;
using Tensors = std::unordered_map<std::string, at::Tensor>;

// A file, mapped as long as the program runs.
std::string_view map_file(const Path& path) {
  const int file = open(path.c_str(), O_RDONLY);
  const auto size = file < 0 ? 0 : std::filesystem::file_size(path);
  void* data = size ? mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file, 0) : nullptr;
  if (file < 0 || data == MAP_FAILED) throw std::runtime_error(path.string() + " cannot be read");
  close(file);
  return {(const char*)data, size};
}

std::string sha256(std::string_view content) {
  unsigned char digest[EVP_MAX_MD_SIZE];
  EVP_Digest(content.data(), content.size(), digest, nullptr, EVP_sha256(), nullptr);
  char hex[65];
  for (int i = 0; i < 32; ++i) snprintf(hex + 2 * i, 3, "%02x", digest[i]);
  return hex;
}

template <class F>
void each_match(std::string_view text, const char* pattern, F found) {
  const std::regex regex(pattern);
  for (std::cregex_iterator match(text.begin(), text.end(), regex), end; match != end; ++match)
    found(*match);
}

// The artifact's files by name, each of them what the manifest says: packages are machine code.
std::map<std::string, std::string_view> open_artifact(const Path& root) {
  std::map<std::string, std::string_view> files;
  each_match(map_file(root / "manifest.json"),
             R"re("([^"\\]+)":\s*\{\s*"bytes":\s*(\d+),\s*"sha256":\s*"([0-9a-f]{64})"\s*\})re",
             [&](const std::cmatch& entry) {
               const std::string name = entry[1];
               if (name[0] == '/' || name.find("..") != std::string::npos)
                 throw std::runtime_error("the manifest names a file outside of the artifact");
               const std::string_view content = files[name] = map_file(root / name);
               if (content.size() != std::stoull(entry[2]) || sha256(content) != entry[3])
                 throw std::runtime_error((root / name).string() + " is damaged");
             });
  return files;
}

// Tensors that are the mapped file's own memory.
void add_tensors(std::string_view file, Tensors& tensors) {
  uint64_t length = 0;
  if (file.size() >= 8) std::memcpy(&length, file.data(), 8);
  if (file.size() < 8 || length > file.size() - 8) throw std::runtime_error("no safetensors");
  const std::map<std::string, at::ScalarType> types = {{"F32", at::kFloat}, {"F16", at::kHalf},
      {"BF16", at::kBFloat16}, {"I32", at::kInt}, {"I64", at::kLong}};
  const char* entry =
      R"re("([^"]+)":\{"dtype":"(\w+)","shape":\[([\d,]*)\],"data_offsets":\[(\d+),)re";
  each_match(file.substr(8, length), entry, [&](const std::cmatch& match) {
    std::vector<int64_t> shape;
    std::istringstream sizes(match[3]);
    for (std::string size; std::getline(sizes, size, ',');) shape.push_back(std::stoll(size));
    char* data = (char*)file.data() + 8 + length + std::stoull(match[4]);
    const auto tensor = tensors[match[1]] = at::from_blob(data, shape, types.at(match[2]));
    if (data + tensor.nbytes() > file.data() + file.size()) throw std::runtime_error("truncated");
  });
}

// A package whose constants are those tensors, not copied; it must be of this PyTorch.
std::unique_ptr<AOTIModelPackageLoader> load(const Path& package, const Tensors& tensors) {
  auto made = AOTIModelPackageLoader::load_metadata_from_package(package, "model");
  if (made["torch"] != TORCH_VERSION)
    throw std::runtime_error(package.string() + " was compiled with another PyTorch");
  auto loader = std::make_unique<AOTIModelPackageLoader>(package);
  Tensors own;
  for (const auto& name : loader->get_constant_fqns()) own[name] = tensors.at(name);
  loader->load_constants(own, false, true, /*user_managed=*/true);
  return loader;
}

int main(int argc, char** argv) try {
  if (argc != 4) throw std::runtime_error("usage: generate ARTIFACT ID,ID,... NEW_TOKENS");
  const c10::InferenceMode inference;
  const auto files = open_artifact(argv[1]);
  if (!files.count("programs/prefill.pt2") || !files.count("programs/decode.pt2"))
    throw std::runtime_error("no packages: compile with --aot-inductor");
  Tensors tensors;
  for (const auto& [name, content] : files)
    if (name.ends_with(".safetensors")) add_tensors(content, tensors);
  const auto prefill = load(Path(argv[1]) / "programs/prefill.pt2", tensors);
  const auto decode = load(Path(argv[1]) / "programs/decode.pt2", tensors);

  const auto about = decode->get_metadata();
  const auto size = [&](const char* name) { return std::stoll(about.at(name)); };
  const int64_t most = size("max_seq_len");
  std::vector<at::Tensor> cache;  // what was not written yet is not read
  for (int64_t i = 0; i < 2 * size("layers"); ++i)
    cache.push_back(at::empty({1, size("kv_heads"), most, size("head_dim")}));
  std::vector<int64_t> ids;
  std::istringstream prompt(argv[2]);
  for (std::string id; std::getline(prompt, id, ',');) {
    ids.push_back(std::stoll(id));
    if (ids.back() < 0 || ids.back() >= size("vocab")) throw std::runtime_error("no token " + id);
  }
  const int64_t wanted = std::stoll(argv[3]);
  if (ids.empty() || wanted < 1 || (int64_t)ids.size() + wanted > most)
    throw std::runtime_error("expected 1 to " + std::to_string(most) + " tokens, new ones too");

  for (int64_t made = 0, filled = 0; made < wanted; ++made) {
    const auto next = at::tensor(ids).view({1, -1});  // the prompt, then one token at a time
    const auto slots = at::arange(filled, filled + next.size(1)), start = at::zeros(1, at::kLong);
    std::vector<at::Tensor> inputs = {next, slots.view({1, -1}), start, at::tensor({filled})};
    inputs.insert(inputs.end(), cache.begin(), cache.end());
    const auto logits = (made == 0 ? prefill : decode)->run(inputs)[0];
    filled += next.size(1);
    ids = {logits.view(-1).argmax().item<int64_t>()};
    std::cout << (made ? "," : "") << ids[0] << std::flush;
  }
  std::cout << std::endl;
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << std::endl;
  return 2;
}
