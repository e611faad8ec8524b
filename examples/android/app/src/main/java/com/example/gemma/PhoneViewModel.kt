package com.example.gemma

import android.app.Application
import androidx.lifecycle.AndroidViewModel
import kotlinx.coroutines.CancellationException
import kotlinx.coroutines.CoroutineScope
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.SupervisorJob
import kotlinx.coroutines.flow.MutableStateFlow
import kotlinx.coroutines.flow.StateFlow
import kotlinx.coroutines.flow.asStateFlow
import kotlinx.coroutines.flow.update
import kotlinx.coroutines.launch
import kotlinx.coroutines.sync.Mutex
import kotlinx.coroutines.sync.withLock
import java.io.File

data class Turn(
    val ofModel: Boolean,
    val text: String,
)

data class PhoneState(
    val ready: Boolean = false,
    val busy: Boolean = false,
    val problem: String? = null,
    val chat: List<Turn> = emptyList(),
    val called: Called? = null,
    val label: String? = null,
)

/** The model and what is on the screen; both outlive a rotation. */
class PhoneViewModel(
    application: Application,
) : AndroidViewModel(application) {
    val assistant =
        Assistant(
            application.assets
                .open("assistant.json")
                .bufferedReader()
                .use { it.readText() },
        )
    private val shown = MutableStateFlow(PhoneState())
    val state: StateFlow<PhoneState> = shown.asStateFlow()

    // not viewModelScope, which ends at once: an answer must have ended before its engine is closed
    private val scope = CoroutineScope(SupervisorJob() + Dispatchers.IO)
    private val oneAtATime = Mutex()
    private val functions = Functions(application)

    @Volatile private var model: LanguageModel? = null

    init {
        load()
    }

    /** Looks for the file that `adb` put there, and loads it. */
    fun load() =
        work {
            if (model == null) {
                val application = getApplication<Application>()
                val file = File(application.filesDir, "model.litertlm")
                check(file.exists()) { "Put a model at $file: README.md says how." }
                model = LanguageModel(file.path, application.cacheDir.path, assistant)
                shown.update { it.copy(ready = true) }
            }
        }

    fun chat(text: String) =
        withModel { model ->
            shown.update { it.copy(chat = it.chat + Turn(false, text) + Turn(true, "")) }
            model.chat(text).collect { piece ->
                shown.update {
                    val last = it.chat.last()
                    it.copy(chat = it.chat.dropLast(1) + last.copy(text = last.text + piece))
                }
            }
        }

    fun stop() {
        model?.stop()
    }

    fun newChat() =
        withModel { model ->
            model.forget()
            shown.update { it.copy(chat = emptyList()) }
        }

    fun call(text: String) =
        withModel { model ->
            shown.update { it.copy(called = null) }
            val called = model.call(text, functions::run)
            shown.update { it.copy(called = called) }
        }

    fun classify(text: String) =
        withModel { model ->
            shown.update { it.copy(label = null) }
            val label = model.classify(text)
            shown.update { it.copy(label = label) }
        }

    override fun onCleared() {
        stop()
        scope.launch {
            oneAtATime.withLock {
                model?.close()
                model = null
            }
        }
    }

    private fun withModel(block: suspend (LanguageModel) -> Unit) =
        work {
            model?.let { block(it) }
        }

    private fun work(block: suspend () -> Unit) {
        scope.launch {
            oneAtATime.withLock {
                shown.update { it.copy(busy = true, problem = null) }
                try {
                    block()
                } catch (cancelled: CancellationException) {
                    throw cancelled
                } catch (error: Exception) {
                    shown.update { it.copy(problem = error.message ?: error.toString()) }
                } finally {
                    shown.update { it.copy(busy = false) }
                }
            }
        }
    }
}
