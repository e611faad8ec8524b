package com.example.gemma

import org.json.JSONObject

/**
 * What the app says to the model and how the model may answer: `assistant.json`. `make_assets.py`
 * writes it, and the tests on a desktop ask LiteRT-LM the same things from the same file.
 */
class Assistant(
    json: String,
) {
    private val tasks = JSONObject(json)
    val chat = Task(tasks.getJSONObject("chat"))
    val functions = Functions(tasks.getJSONObject("functions"))
    val classify = Classify(tasks.getJSONObject("classify"))

    open class Task(
        json: JSONObject,
    ) {
        val sampling = Sampling(json.getJSONObject("sampler"))
        val maxTokens: Int = json.getInt("max_tokens")
        val suggestion: String = json.getString("suggestion")
    }

    class Functions(
        json: JSONObject,
    ) : Task(json) {
        val system: String = json.getString("system")
        val schema: String = json.getJSONObject("schema").toString()
        private val results: String = json.getString("results")

        /** The user's turn that tells the model what a call gave. */
        fun results(
            name: String,
            result: String,
        ): String =
            results
                .replace("%name", JSONObject.quote(name))
                .replace("%result", JSONObject.quote(result))
    }

    class Classify(
        json: JSONObject,
    ) : Task(json) {
        /** A regular expression that only labels match. */
        val pattern: String = json.getString("pattern")
        private val prompt: String = json.getString("prompt")

        fun prompt(text: String): String = prompt.replace("%text", text)
    }

    /** How a token is drawn. */
    class Sampling(
        json: JSONObject,
    ) {
        val topK: Int = json.getInt("top_k")
        val topP: Double = json.getDouble("top_p")
        val temperature: Double = json.getDouble("temperature")
        val seed: Int = json.getInt("seed")
    }
}
