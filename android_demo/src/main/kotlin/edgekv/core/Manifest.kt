package edgekv.core

import java.io.File
import java.io.IOException

class FileEntry(val size: Long, val sha256: String, val sample: String?)

/** The vocabulary's size and the ids with a meaning of their own. */
class Tokens(val vocab: Int, val bos: Int?, val eos: List<Int>, val suppress: List<Int>)

/** What ties a snapshot to its model and to the layout of its state: digests that the exporter wrote. */
class Identity(val model: String, val plan: String)

/** Layout of the per-layer embedding file; format: docs/artifact.md. */
class PleEntry(val file: String, val rows: Int, val layers: Int, val dim: Int, val bits: Int, val block: Int) {
    val values get() = layers.toLong() * dim
    val dataBytes get() = values * bits / 8
    val rowBytes get() = dataBytes + if (bits == 32) 0 else values / block * 2
}

/** One graph input or output; an axis is a number, or the name of an open one. */
class TensorIO(val name: String, val dtype: String, val shape: List<Any>)

class Program(val file: String, val inputs: List<TensorIO>, val outputs: List<TensorIO>)

class Backend(val programs: Map<String, Program>, val files: List<String>, val details: Map<*, *>)

class TokenizerEntry(val file: String, val chatTemplate: String?, val addBos: Boolean)

/** What the weights take in bytes, and how many values the widest activations of a token have. */
class Needs(val weights: Long, val row: Int)

/** `manifest.json`, schema 2: what `edge_kv.manifest` writes, field by field, typed and bounded as there. */
class Manifest private constructor(
    val name: String,
    /** The version of edge-kv that wrote it. */
    val madeBy: String,
    val tokens: Tokens,
    /** What the checkpoint recommends; greedy where it says nothing. */
    val sampling: Sampling,
    val identity: Identity,
    val plan: Plan,
    val quant: String,
    val ple: PleEntry?,
    val backends: Map<String, Backend>,
    val tokenizer: TokenizerEntry?,
    val needs: Needs,
    val files: Map<String, FileEntry>,
    private val vectors: List<String>,
) {
    /** Every file that a part of the manifest uses. */
    val namedFiles: List<String>
        get() = backends.values.flatMap { b -> b.files + b.programs.values.map { it.file } } +
            listOfNotNull(ple?.file, tokenizer?.file, tokenizer?.chatTemplate) + vectors

    companion object {
        const val SCHEMA_VERSION = 2L
        const val FILE = "manifest.json"
        private val COUNT = 1..Int.MAX_VALUE
        private val NUMBER = 0..Int.MAX_VALUE
        private val SIZE = 0L..(1L shl 53)
        private val SHARE = 0.0..1.0
        private val DISTANCE = 0.0..1e30
        private val DIGEST = Regex("[0-9a-f]{64}")
        private val NAME = Regex("[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
        private val AXIS = Regex("[a-z][a-z0-9]{0,15}")
        private val FILE_NAME = Regex(".{1,256}", RegexOption.DOT_MATCHES_ALL)
        private val STORAGE = Regex("f32|f16|int8")
        private const val LABEL = 256
        private const val MANY = 65_536
        private const val FEW = 4096
        private const val MOST_DRAFTS = 8
        private const val STATE_LIMIT = 1L shl 42
        private const val LONGEST = 8L shl 20 // bytes of a manifest
        private const val LONGEST_TEXT = 64L shl 20 // of a tokenizer or a template

        /** @throws ArtifactException not to be read, too long, not JSON, another version, or not the schema */
        fun read(file: File): Manifest {
            val where = file.path
            val size = file.length()
            if (size > LONGEST) {
                throw ArtifactException("$where has $size bytes, at most $LONGEST are read; the artifact is damaged.")
            }
            val tree = try {
                Json.parse(file.readBytes())
            } catch (e: IOException) {
                throw ArtifactException("Cannot read $where: ${e.message}.", e)
            } catch (e: JsonException) {
                throw ArtifactException("$where is not valid JSON (${e.message}); the artifact is damaged.", e)
            }
            val map = tree as? Map<*, *>
                ?: throw ArtifactException("$where is not a JSON object; the artifact is damaged.")
            if (map["schema_version"] != SCHEMA_VERSION) {
                throw ArtifactException(
                    "$where has schema_version ${Json.write(map["schema_version"]).take(40)}, this app reads " +
                        "$SCHEMA_VERSION; update the app or export again.",
                )
            }
            return read(Fields(map, where))
        }

        private fun read(f: Fields): Manifest {
            f.only(
                "schema_version", "edge_kv", "name", "tokens", "sampling", "identity", "plan", "quant", "ple", "drafter",
                "backends", "tokenizer", "parity", "needs", "files", "made",
            )
            f.tree("made") // for people
            if (f.has("drafter")) drafter(f.fields("drafter"))
            val files = f.fields("files").entries(FILE_NAME) {
                it.only("size", "sha256", "sample")
                val sample = if (it.has("sample")) it.text("sample", DIGEST) else null
                FileEntry(it.long("size", SIZE), it.text("sha256", DIGEST), sample)
            }
            val tokenizer = f.fieldsOrNull("tokenizer")?.let(::tokenizer)
            for (name in listOfNotNull(tokenizer?.file, tokenizer?.chatTemplate)) {
                val size = files[name]?.size ?: continue
                if (size > LONGEST_TEXT) {
                    throw ArtifactException(
                        "The manifest lists $name with $size bytes, at most $LONGEST_TEXT are read; export again.",
                    )
                }
            }
            return Manifest(
                name = f.text("name", LABEL),
                madeBy = f.text("edge_kv", LABEL),
                tokens = tokens(f.fields("tokens")),
                sampling = sampling(f.fields("sampling")),
                identity = identity(f.fields("identity")),
                plan = plan(f.fields("plan")),
                quant = quant(f.fields("quant")),
                ple = f.fieldsOrNull("ple")?.let(::ple),
                backends = f.fields("backends").entries(NAME, ::backend),
                tokenizer = tokenizer,
                needs = needs(f.fields("needs")),
                files = files,
                vectors = f.fields("parity").entries(NAME, ::vectors).values.toList(),
            )
        }

        private fun tokens(f: Fields): Tokens {
            f.only("vocab", "bos", "eos", "pad", "suppress")
            val vocab = f.int("vocab", COUNT)
            val ids = 0 until vocab
            f.intOrNull("pad", ids)
            return Tokens(vocab, f.intOrNull("bos", ids), f.ints("eos", ids, 64), f.ints("suppress", ids, MANY))
        }

        private fun sampling(f: Fields): Sampling {
            f.only("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
            val positive = Double.MIN_VALUE
            fun number(name: String, range: ClosedFloatingPointRange<Double>, off: Double) =
                if (f.has(name)) f.double(name, range) else off
            return Sampling(
                number("temperature", 0.0..100.0, 0.0),
                if (f.has("top_k")) f.int("top_k", NUMBER) else 0,
                number("top_p", positive..1.0, 1.0),
                number("min_p", SHARE, 0.0),
                number("repetition_penalty", positive..100.0, 1.0),
            )
        }

        private fun identity(f: Fields): Identity {
            f.only("model", "plan")
            return Identity(f.text("model", DIGEST), f.text("plan", DIGEST))
        }

        private fun plan(f: Fields): Plan {
            f.only("ctx", "chunk", "kv", "tables", "drafts")
            val ctx = f.int("ctx", COUNT)
            val chunk = f.int("chunk", COUNT)
            if (chunk > ctx) f.refuse("chunk", "at most ctx ($ctx)")
            val drafts = if ("drafts" in f.names) f.int("drafts", 0..MOST_DRAFTS) else 0
            if (drafts >= chunk) f.refuse("drafts", "fewer than the tokens of a chunk ($chunk)")
            val tables = f.listOfFields("tables", MANY).map { table(it, ctx, chunk) }
            val names = HashSet<String>()
            tables.firstOrNull { !names.add(it.name) }?.let { f.refuse("tables", "${it.name} once") }
            tables.firstOrNull { it.dtype == "int8" && it.name + ".scale" !in names }
                ?.let { f.refuse("tables", "${it.name}.scale beside ${it.name}") }
            if (tables.sumOf { it.slots.toDouble() * it.rowBytes } > STATE_LIMIT) {
                f.refuse("tables", "tables of at most $STATE_LIMIT bytes")
            }
            return Plan(ctx, chunk, f.text("kv", STORAGE), tables, drafts)
        }

        /** A table, refused where it could lose a row: the checks of `edge_kv.plan.Plan.validate`. */
        private fun table(f: Fields, ctx: Int, chunk: Int): Table {
            f.only("name", "row", "slots", "stride", "keep", "dtype", "writer", "readers", "picks", "exact")
            val writer = f.int("writer", NUMBER)
            if (f.ints("readers", NUMBER, FEW).let { it.isEmpty() || it.min() < writer }) {
                f.refuse("readers", "layers from its writer ($writer) on")
            }
            f.int("picks", NUMBER)
            f.flag("exact")
            val row = f.ints("row", COUNT, 2)
            if (row.size != 2) f.refuse("row", "heads and dim")
            val stride = f.int("stride", COUNT)
            val keep = f.int("keep", NUMBER)
            if (keep > 0 && stride > 1) f.refuse("keep", "0 where the stride is $stride")
            val need = when {
                keep > 0 -> minOf(ctx.toLong(), keep.toLong() + chunk - 1)
                stride == 1 -> ctx.toLong()
                else -> (ctx.toLong() + stride - 1) / stride + 1
            }
            val slots = f.int("slots", COUNT)
            if (slots < need) f.refuse("slots", "at least $need, or the oldest row of a chunk is lost")
            return Table(f.text("name", NAME), row[0], row[1], slots, stride, keep, f.text("dtype", STORAGE))
        }

        private fun quant(f: Fields): String {
            f.only("scheme", "formats", "tensors")
            val formats = f.fields("formats")
            for (name in formats.names) {
                if (!NAME.matches(name)) formats.refuse(name, "the name of a kind of tensor")
                formats.text(name, NAME)
            }
            f.fields("tensors").entries(NAME) {
                it.only("format", "error")
                it.text("format", NAME)
                it.double("error", DISTANCE)
            }
            return f.text("scheme", NAME)
        }

        private fun ple(f: Fields): PleEntry {
            f.only("file", "rows", "n_layers", "dim", "bits", "block")
            return PleEntry(
                f.text("file", FILE_NAME), f.int("rows", COUNT), f.int("n_layers", COUNT), f.int("dim", COUNT),
                f.int("bits", COUNT), f.int("block", NUMBER),
            )
        }

        /** What the app does not run, and still refuses where Python does. */
        private fun drafter(f: Fields) {
            f.only("width", "read")
            f.int("width", COUNT)
            f.long("read", SIZE)
        }

        private fun backend(f: Fields): Backend {
            f.only("programs", "files", "details")
            val programs = f.fields("programs").entries(NAME) {
                it.only("file", "inputs", "outputs")
                Program(it.text("file", FILE_NAME), tensors(it, "inputs"), tensors(it, "outputs"))
            }
            return Backend(programs, f.texts("files", FEW), if ("details" in f.names) f.tree("details") else emptyMap<String, Any?>())
        }

        private fun tensors(f: Fields, name: String) = f.listOfFields(name, MANY).map { tensor ->
            tensor.only("name", "dtype", "shape")
            val shape = tensor.list("shape", 8).map { axis ->
                when {
                    axis is Long && axis in COUNT.first..COUNT.last -> axis.toInt()
                    axis is String && AXIS.matches(axis) -> axis
                    else -> tensor.refuse("shape", "sizes and names of axes")
                }
            }
            TensorIO(tensor.text("name", NAME), tensor.text("dtype", NAME), shape)
        }

        private fun tokenizer(f: Fields): TokenizerEntry {
            f.only("file", "chat_template", "add_bos")
            val template = if (f.has("chat_template")) f.text("chat_template", FILE_NAME) else null
            return TokenizerEntry(f.text("file", FILE_NAME), template, "add_bos" !in f.names || f.flag("add_bos"))
        }

        /** Checks what one backend's programs met when they were made; the file of its reference vectors. */
        private fun vectors(f: Fields): String {
            f.only(
                "prompt", "steps", "lowering", "kernels", "quantisation", "perplexity", "correlation",
                "lead_change", "lowering_limit", "vectors", "verify", "draft",
            )
            f.int("prompt", NUMBER)
            f.int("steps", COUNT)
            distances(f, listOf("min_top1"))
            if (f.has("perplexity")) distances(f, "perplexity")
            if (f.has("lead_change")) f.double("lead_change", DISTANCE)
            if (f.has("draft")) {
                val draft = f.fields("draft")
                draft.only(
                    "drafts", "lowering", "kernels", "quantisation", "correlation", "lowering_limit", "verify",
                )
                draft.int("drafts", COUNT)
                distances(draft, listOf("min_top1", "min_common"))
            }
            return f.text("vectors", FILE_NAME)
        }

        /** Checks how far programs were from the model, and the `shares` that a device has to keep. */
        private fun distances(f: Fields, shares: List<String>) {
            f.double("correlation", -1.0..1.0)
            for (name in listOf("lowering", "kernels", "quantisation", "lowering_limit")) distances(f, name)
            val verify = f.fields("verify")
            verify.only("max_kl", *shares.toTypedArray())
            verify.double("max_kl", DISTANCE)
            for (share in shares) verify.double(share, SHARE)
        }

        private fun distances(f: Fields, name: String) {
            val distances = f.fields(name)
            for (measure in distances.names) {
                if (!NAME.matches(measure)) distances.refuse(measure, "the name of a distance")
                distances.double(measure, DISTANCE)
            }
        }

        private fun needs(f: Fields): Needs {
            f.only("weights", "dense", "experts", "read_weights", "read_experts", "prefill", "row")
            val weights = f.fields("weights")
            val bytes = weights.names.sumOf { name ->
                if (!NAME.matches(name)) weights.refuse(name, "the name of a kind of weight")
                weights.long(name, SIZE)
            }
            for (name in listOf("dense", "experts", "read_weights", "read_experts", "prefill")) f.long(name, SIZE)
            return Needs(bytes, f.int("row", NUMBER))
        }
    }
}
