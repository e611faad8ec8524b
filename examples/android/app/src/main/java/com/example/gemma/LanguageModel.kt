package com.example.gemma

import com.google.ai.edge.litertlm.Backend
import com.google.ai.edge.litertlm.Contents
import com.google.ai.edge.litertlm.Conversation
import com.google.ai.edge.litertlm.ConversationConfig
import com.google.ai.edge.litertlm.Engine
import com.google.ai.edge.litertlm.EngineConfig
import com.google.ai.edge.litertlm.Message
import com.google.ai.edge.litertlm.ResponseFormat
import com.google.ai.edge.litertlm.SamplerConfig
import kotlinx.coroutines.CancellationException
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.flow
import org.json.JSONArray
import org.json.JSONException
import org.json.JSONObject

/** A call that the model made, what it gave, and what the model says to that. */
data class Called(
    val name: String,
    val arguments: String,
    val result: String,
    val reply: String,
)

/**
 * One `.litertlm` in LiteRT-LM: a chat that streams and can be stopped, calls of functions, classes.
 *
 * Everything but [stop] takes its time and must not run on the main thread; one thing at a time, in
 * one conversation at a time. The chat is kept as messages as well, and goes on from them after a
 * call, a class or a stop: in LiteRT-LM 0.18 a conversation that was stopped answers nothing more.
 * And a response format stays in force for all that follows, so what a function gave is told in a
 * conversation without.
 *
 * @throws Exception if the file is no model that LiteRT-LM can load.
 */
class LanguageModel(
    path: String,
    cache: String,
    private val assistant: Assistant,
) : AutoCloseable {
    private val engine =
        Engine(EngineConfig(modelPath = path, backend = Backend.CPU(), cacheDir = cache))
    private val said = mutableListOf<Message>()

    @Volatile private var conversation: Conversation? = null

    @Volatile private var stopped = false

    init {
        engine.initialize()
    }

    /** The pieces of the answer to a turn of the chat, which ends early on [stop]. */
    fun chat(text: String): Flow<String> =
        flow {
            stopped = false
            val open =
                conversation ?: converse(assistant.chat, said = said).also { conversation = it }
            val answer = StringBuilder()
            var whole = false
            try {
                open.sendMessageAsync(text).collect { piece ->
                    answer.append(piece)
                    emit(piece.toString())
                }
                whole = true
            } catch (cancelled: CancellationException) {
                if (!stopped) throw cancelled
            } finally {
                if (!whole) leave()
            }
            if (answer.isNotEmpty()) {
                said += Message.user(text)
                said += Message.model(answer.toString())
            }
        }

    /** Ends the answer that is being written, if there is one. */
    fun stop() {
        stopped = true
        conversation?.cancelProcess()
    }

    /** Begins a new chat. */
    fun forget() {
        leave()
        said.clear()
    }

    /** Lets the model choose a function for a text, runs it, and tells the model what it gave. */
    fun call(
        text: String,
        run: (name: String, arguments: JSONObject) -> String,
    ): Called {
        leave()
        val task = assistant.functions
        val format = ResponseFormat.json(task.schema)
        val answer =
            converse(task, system = task.system, constrained = true).use {
                it.sendMessage(text, responseFormat = format).toString()
            }
        val call =
            try {
                JSONArray(answer).getJSONObject(0)
            } catch (cut: JSONException) {
                throw IllegalStateException("This call was cut short: $answer", cut)
            }
        val name = call.getString("name")
        val arguments = call.getJSONObject("arguments")
        val result = run(name, arguments)
        val before = listOf(Message.user(text), Message.model(answer))
        val reply =
            converse(task, system = task.system, said = before).use {
                it.sendMessage(task.results(name, result)).toString()
            }
        return Called(name, arguments.toString(), result, reply)
    }

    /** The label of a text, one of those that the asset's pattern allows. */
    fun classify(text: String): String {
        leave()
        val task = assistant.classify
        return converse(task, constrained = true).use { open ->
            val format = ResponseFormat.regex(task.pattern)
            open.sendMessage(task.prompt(text), responseFormat = format).toString()
        }
    }

    override fun close() {
        leave()
        engine.close()
    }

    private fun leave() {
        conversation?.close()
        conversation = null
    }

    private fun converse(
        task: Assistant.Task,
        system: String? = null,
        said: List<Message> = emptyList(),
        constrained: Boolean = false,
    ): Conversation =
        engine.createConversation(
            ConversationConfig(
                systemInstruction = system?.let { Contents.of(it) },
                initialMessages = said.toList(),
                samplerConfig =
                    SamplerConfig(
                        topK = task.sampling.topK,
                        topP = task.sampling.topP,
                        temperature = task.sampling.temperature,
                        seed = task.sampling.seed,
                    ),
                maxOutputToken = task.maxTokens,
                enableResponseFormat = constrained,
            ),
        )
}
