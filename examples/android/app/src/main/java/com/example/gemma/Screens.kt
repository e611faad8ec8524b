package com.example.gemma

import androidx.compose.foundation.layout.Arrangement
import androidx.compose.foundation.layout.Column
import androidx.compose.foundation.layout.Row
import androidx.compose.foundation.layout.fillMaxSize
import androidx.compose.foundation.layout.fillMaxWidth
import androidx.compose.foundation.layout.imePadding
import androidx.compose.foundation.layout.padding
import androidx.compose.foundation.lazy.LazyColumn
import androidx.compose.foundation.lazy.items
import androidx.compose.foundation.lazy.rememberLazyListState
import androidx.compose.material3.Button
import androidx.compose.material3.MaterialTheme
import androidx.compose.material3.OutlinedButton
import androidx.compose.material3.OutlinedTextField
import androidx.compose.material3.Scaffold
import androidx.compose.material3.Tab
import androidx.compose.material3.TabRow
import androidx.compose.material3.Text
import androidx.compose.runtime.Composable
import androidx.compose.runtime.LaunchedEffect
import androidx.compose.runtime.getValue
import androidx.compose.runtime.mutableIntStateOf
import androidx.compose.runtime.mutableStateOf
import androidx.compose.runtime.saveable.rememberSaveable
import androidx.compose.runtime.setValue
import androidx.compose.ui.Modifier
import androidx.compose.ui.text.font.FontFamily
import androidx.compose.ui.unit.dp
import androidx.lifecycle.compose.collectAsStateWithLifecycle
import androidx.lifecycle.viewmodel.compose.viewModel

private val TABS = listOf("Chat", "Functions", "Notifications")

@Composable
fun PhoneScreen(viewModel: PhoneViewModel = viewModel()) {
    val state by viewModel.state.collectAsStateWithLifecycle()
    var tab by rememberSaveable { mutableIntStateOf(0) }
    Scaffold { inside ->
        Column(Modifier.padding(inside).imePadding().fillMaxSize()) {
            TabRow(selectedTabIndex = tab) {
                TABS.forEachIndexed { i, title ->
                    Tab(selected = tab == i, onClick = { tab = i }, text = { Text(title) })
                }
            }
            Column(Modifier.padding(16.dp), verticalArrangement = Arrangement.spacedBy(12.dp)) {
                when {
                    state.problem != null -> Problem(state, viewModel)
                    !state.ready -> Text("Loading the model ...")
                }
                when (tab) {
                    0 -> ChatTab(state, viewModel)
                    1 -> FunctionsTab(state, viewModel)
                    else -> NotificationsTab(state, viewModel)
                }
            }
        }
    }
}

@Composable
private fun Problem(
    state: PhoneState,
    viewModel: PhoneViewModel,
) {
    Text(state.problem.orEmpty(), color = MaterialTheme.colorScheme.error)
    if (!state.ready) {
        OutlinedButton(onClick = viewModel::load, enabled = !state.busy) { Text("Try again") }
    }
}

@Composable
private fun ChatTab(
    state: PhoneState,
    viewModel: PhoneViewModel,
) {
    val list = rememberLazyListState()
    LaunchedEffect(state.chat) {
        if (state.chat.isNotEmpty()) list.scrollToItem(state.chat.lastIndex, Int.MAX_VALUE)
    }
    Ask("Send", viewModel.assistant.chat.suggestion, state, viewModel::chat)
    Row(horizontalArrangement = Arrangement.spacedBy(8.dp)) {
        OutlinedButton(onClick = viewModel::stop, enabled = state.busy) { Text("Stop") }
        OutlinedButton(onClick = { viewModel.newChat() }, enabled = !state.busy) {
            Text("New chat")
        }
    }
    LazyColumn(
        Modifier.fillMaxSize(),
        list,
        verticalArrangement = Arrangement.spacedBy(8.dp),
    ) {
        items(state.chat) { turn ->
            val colors = MaterialTheme.colorScheme
            Text(turn.text, color = if (turn.ofModel) colors.onSurface else colors.primary)
        }
    }
}

@Composable
private fun FunctionsTab(
    state: PhoneState,
    viewModel: PhoneViewModel,
) {
    Ask("Call", viewModel.assistant.functions.suggestion, state, viewModel::call)
    state.called?.let { called ->
        Text("${called.name} ${called.arguments}", fontFamily = FontFamily.Monospace)
        Text(called.result)
        Text(called.reply, color = MaterialTheme.colorScheme.secondary)
    }
}

@Composable
private fun NotificationsTab(
    state: PhoneState,
    viewModel: PhoneViewModel,
) {
    Ask("Sort", viewModel.assistant.classify.suggestion, state, viewModel::classify)
    state.label?.let { Text(it, style = MaterialTheme.typography.headlineMedium) }
}

/** A text for the model, and the button that gives it to the model. */
@Composable
private fun Ask(
    button: String,
    suggestion: String,
    state: PhoneState,
    ask: (String) -> Unit,
) {
    var text by rememberSaveable { mutableStateOf(suggestion) }
    OutlinedTextField(
        value = text,
        onValueChange = { text = it },
        modifier = Modifier.fillMaxWidth(),
    )
    Button(
        onClick = { ask(text.trim()) },
        enabled = state.ready && !state.busy && text.isNotBlank(),
    ) { Text(button) }
}
