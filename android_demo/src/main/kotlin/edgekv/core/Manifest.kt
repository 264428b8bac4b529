package edgekv.core

/** The facts of the model that a runtime needs; all of it stays in `Manifest.modelTree`. */
class ModelConfig(
    val family: String,
    val vocabSize: Int,
    val pattern: String,
    val slidingWindow: Int,
    val sharing: Int,
    val pleDim: Int,
    val bosId: Int,
    val eosIds: List<Int>,
) {
    val layers get() = pattern.length

    /** Layers 0 … owning-1 own keys and values; the others read theirs. */
    val owning get() = pattern.length - sharing
}

/** Layout of the per-layer embedding file; format: docs/artifact.md. */
class PleEntry(val file: String, val rows: Int, val layers: Int, val dim: Int, val bits: Int, val block: Int) {
    val values get() = layers * dim
    val dataBytes get() = values * bits / 8
    val rowBytes get() = dataBytes + if (bits == 32) 0 else values / block * 2
}

class TensorIO(val name: String, val dtype: String, val shape: List<Any?>)

class Program(val file: String, val inputs: List<TensorIO>, val outputs: List<TensorIO>)

class Backend(val programs: Map<String, Program>, val files: List<String>, val details: Map<*, *>)

class TokenizerEntry(val file: String, val chatTemplate: String?, val addBos: Boolean, val stopIds: List<Int>)

class FileEntry(val size: Long, val sha256: String)

/** Peak bytes of one phase, as `edge-kv plan` predicted them when the artifact was made. */
class PhasePlan(val anon: Long, val file: Long)

/** `manifest.json`, schema version 1; the schema in words: docs/artifact.md. */
class Manifest(
    val name: String,
    /** The version of edge-kv that wrote it. */
    val madeBy: String,
    val model: ModelConfig,
    val modelTree: Map<*, *>,
    val plan: KvPlan,
    val quant: String,
    val ple: PleEntry?,
    val backends: Map<String, Backend>,
    val tokenizer: TokenizerEntry?,
    val files: Map<String, FileEntry>,
    val weightFile: Long,
    val tokenizerBytes: Long,
    val phases: Map<String, PhasePlan>,
) {
    /** What ties a KV snapshot to a model: `edge_kv.artifact.model_fingerprint`, to the byte. */
    val fingerprint: String by lazy {
        val digests = files.filterKeys { !it.startsWith("verify") }.map { listOf(it.key, it.value.sha256) }
        val sorted = digests.sortedWith(compareBy({ it[0] }, { it[1] }))
        sha256Hex(Json.python(listOf<Any>(modelTree, quant) + sorted))
    }

    /** Every file that a part of the manifest names. */
    val namedFiles: List<String>
        get() = backends.values.flatMap { b -> b.files + b.programs.values.map { it.file } } +
            listOfNotNull(ple?.file, tokenizer?.file, tokenizer?.chatTemplate)

    companion object {
        const val SCHEMA_VERSION = 1L
        const val FILE = "manifest.json"

        /** @throws ArtifactException not JSON, another version, or not the schema */
        fun parse(bytes: ByteArray, where: String): Manifest {
            val tree = try {
                Json.parse(bytes)
            } catch (e: JsonException) {
                throw ArtifactException("$where is not valid JSON (${e.message}); the artifact is damaged.", e)
            }
            val map = tree as? Map<*, *>
                ?: throw ArtifactException("$where is not a JSON object; the artifact is damaged.")
            if (map["schema_version"] != SCHEMA_VERSION) {
                throw ArtifactException(
                    "$where has schema_version ${Json.compact(map["schema_version"])}, this app reads " +
                        "$SCHEMA_VERSION; update the app or export again.",
                )
            }
            return read(Fields(map, where))
        }

        private fun read(root: Fields): Manifest {
            root.only(
                "schema_version", "edge_kv", "name", "model", "plan", "quant", "ple", "backends",
                "tokenizer", "files", "made", "parity", "memory",
            )
            val model = model(root.fields("model"))
            val quant = root.fields("quant")
            val memory = root.fields("memory")
            return Manifest(
                name = root.text("name"),
                madeBy = root.text("edge_kv"),
                model = model,
                modelTree = root.tree("model"),
                plan = plan(root.fields("plan"), model),
                quant = quant.text("scheme"),
                ple = root.fieldsOrNull("ple")?.let(::ple),
                backends = entries(root.fields("backends"), ::backend),
                tokenizer = root.fieldsOrNull("tokenizer")?.let(::tokenizer),
                files = entries(root.fields("files")) { FileEntry(it.long("size"), it.text("sha256")) },
                weightFile = if (memory.has("weight_file")) memory.long("weight_file") else 0,
                tokenizerBytes = if (memory.has("tokenizer")) memory.long("tokenizer") else 0,
                phases = memory.fieldsOrNull("phases")
                    ?.let { entries(it) { p -> PhasePlan(p.long("anon"), p.long("file")) } } ?: emptyMap(),
            )
        }

        private fun model(f: Fields): ModelConfig {
            val model = ModelConfig(
                family = f.text("family"),
                vocabSize = f.int("vocab_size"),
                pattern = f.text("pattern"),
                slidingWindow = f.int("sliding_window"),
                sharing = f.int("n_kv_shared"),
                pleDim = f.int("ple_dim"),
                bosId = f.int("bos_id"),
                eosIds = f.ints("eos_ids"),
            )
            if (model.vocabSize < 1 || model.slidingWindow < 1 || model.pleDim < 0 || model.owning !in 1..model.layers) {
                throw ArtifactException(
                    "The manifest's model config is not valid (vocab_size ${model.vocabSize}, sliding_window " +
                        "${model.slidingWindow}, ${model.layers} layers, ${model.sharing} sharing); export again.",
                )
            }
            return model
        }

        private fun plan(f: Fields, model: ModelConfig): KvPlan {
            f.only("ctx", "chunk", "kv", "buffers")
            val buffers = f.listOfFields("buffers").map {
                StateBuffer(
                    name = it.text("name"), role = it.text("role"), kind = it.text("kind"),
                    shape = it.ints("shape"), dtype = it.text("dtype"), writer = it.int("writer"),
                    readers = it.ints("readers"), bytes = it.long("bytes"),
                )
            }
            return KvPlan(f.int("ctx"), f.int("chunk"), f.text("kv"), model.slidingWindow, buffers)
                .also { it.validate(model.layers) }
        }

        private fun ple(f: Fields) =
            PleEntry(f.text("file"), f.int("rows"), f.int("n_layers"), f.int("dim"), f.int("bits"), f.int("block"))

        private fun backend(f: Fields) = Backend(
            programs = entries(f.fields("programs")) {
                Program(it.text("file"), tensors(it, "inputs"), tensors(it, "outputs"))
            },
            files = f.texts("files"),
            details = if (f.has("details")) f.tree("details") else emptyMap<String, Any?>(),
        )

        private fun tensors(f: Fields, name: String) =
            f.listOfFields(name).map { TensorIO(it.text("name"), it.text("dtype"), it.list("shape")) }

        private fun tokenizer(f: Fields) = TokenizerEntry(
            file = f.text("file"),
            chatTemplate = f.textOrNull("chat_template"),
            addBos = f.flagOr("add_bos", true),
            stopIds = if (f.has("stop_ids")) f.ints("stop_ids") else emptyList(),
        )

        private fun <T> entries(f: Fields, read: (Fields) -> T): Map<String, T> =
            f.names.associateWith { read(f.fields(it)) }
    }
}
