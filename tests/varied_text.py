"""Strings to try a tokenizer on: 20 scripts, code, emoji, whitespace, controls, odd characters."""

from __future__ import annotations

import random

SENTENCES = {
    "Latin": "Zwölf Boxkämpfer jagten Eva quer über den großen Sylter Deich. L'été, où ça?",
    "Vietnamese": "Trăm năm trong cõi người ta, chữ tài chữ mệnh khéo là ghét nhau.",
    "Greek": "Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία. Γειά σου Κόσμε!",
    "Cyrillic": "Съешь же ещё этих мягких французских булок, да выпей чаю. Ґанок, їжак.",
    "Armenian": "Բել դղյակի ձախ ժամն օֆ ազգությանը ցպահանջ չճշտած վնաս է եզ։",
    "Georgian": "გთხოვთ ახლავე გაიაროთ რეგისტრაცია კონფერენციაზე დასასწრებად.",
    "Hebrew": "דג סקרן שט בים מאוכזב ולפתע מצא חברה. שָׁלוֹם",
    "Arabic": "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر. پچگ",
    "Devanagari": "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश। क्षत्रिय",
    "Bengali": "আমি বাংলায় গান গাই। বিড়াল ঘুমায়।",
    "Gurmukhi": "ਸਤਿ ਸ੍ਰੀ ਅਕਾਲ, ਤੁਸੀਂ ਕਿਵੇਂ ਹੋ?",
    "Gujarati": "કેમ છો? મને ગુજરાતી ગમે છે.",
    "Tamil": "யாமறிந்த மொழிகளிலே தமிழ்மொழி போல் இனிதாவது எங்கும் காணோம்.",
    "Telugu": "తెలుగు భాష చాలా మధురమైనది.",
    "Kannada": "ಬಾ ಇಲ್ಲಿ ಸಂಭವಿಸು ಇಂದೆನ್ನ ಹೃದಯದಲಿ.",
    "Malayalam": "മലയാളം ഒരു ദ്രാവിഡ ഭാഷയാണ്.",
    "Sinhala": "ශ්‍රී ලංකාව ලස්සන රටකි.",
    "Thai": "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า กว่าบรรดาฝูงสัตว์เดรัจฉาน",
    "Lao": "ຂ້ອຍກິນແກ້ວໄດ້ໂດຍທີ່ມັນບໍ່ໄດ້ເຮັດໃຫ້ຂ້ອຍເຈັບ.",
    "Khmer": "ខ្ញុំអាចញ៉ាំកញ្ចក់បាន ដោយគ្មានបញ្ហារ",
    "Burmese": "ကျွန်တော် ကျွန်မ မှန်စားနိုင်တယ်။",
    "Ethiopic": "ሰማይ አይታረስ ንጉሥ አይከሰስ። ብላ ካለኝ እንደአባቴ በቆመጠኝ።",
    "Han": "我能吞下玻璃而不傷身體。天地玄黃，宇宙洪荒。",
    "Kana": "いろはにほへと ちりぬるを。色は匂へど散りぬるを。カタカナ、ｶﾅ",
    "Hangul": "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다. ㅋㅋ",
    "Tibetan": "ཤེལ་སྒོ་ཟ་ནས་ང་ན་གི་མ་རེད།",
    "Code": "def f(x: int) -> dict[str, float]:\n\treturn {'a': x ** 2 // 3, **kw}  # ok\n\n",
    "HTML": "<table><tr><td>1</td></tr></table><br/> <h1>Hi</h1> &amp; <unused3> [multimodal]",
    "Markup": "```json\n{\"k\": [1, 2.5e-3, null]}\n```\n\n| a | b |\n|---|---|\n",
    "Emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇺🇳 ☕️ 🙂🙃 1️⃣ ❤️‍🔥",
    "Symbols": "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, ∑ᵢ αᵢ² ≤ ½ → ∞ ‰ ₹ € £ © ™ ½ ﬁ Ａ １",
}  # fmt: skip
SPACES = " \n\t\r\u00a0\u2003\u200b\u3000\u2028\x0b\x0c"
CONTROLS = "".join(map(chr, [*range(32), 127, 0x85, 0xAD, 0x200D, 0x202E, 0xFEFF, 0xFFFD]))
BLOCKS = [
    (0x20, 0x7F), (0xA0, 0x250), (0x300, 0x370), (0x2500, 0x2600), (0x4E00, 0xA000),
    (0xAC00, 0xD7A4), (0xE000, 0xE100), (0xFFF0, 0x10000), (0x10300, 0x10350), (0x12000, 0x12100),
    (0x1D400, 0x1D500), (0x1F300, 0x1FAFF), (0x20000, 0x20100), (0xE0000, 0xE0080),
    (0x10FFF0, 0x110000),
]  # fmt: skip


def samples(count: int, seed: int = 0) -> list[str]:
    """`count` different strings, the same for a seed."""
    rng = random.Random(seed)
    found: dict[str, None] = dict.fromkeys([*SENTENCES.values(), "", " ", "\n", "\0"])
    makers = (_slice, _mixture, _whitespace, _controls, _characters, _broken_utf8)
    while len(found) < count:
        found[rng.choice(makers)(rng)] = None
    return list(found)


def _slice(rng: random.Random) -> str:
    text = rng.choice(list(SENTENCES.values()))
    start = rng.randrange(len(text))
    return text[start : start + rng.randrange(1, 80)]


def _mixture(rng: random.Random) -> str:
    return rng.choice(["", " ", "\n", ", "]).join(_slice(rng) for _ in range(rng.randrange(2, 6)))


def _whitespace(rng: random.Random) -> str:
    runs = (rng.choice(SPACES) * rng.randrange(1, 40) for _ in range(rng.randrange(1, 5)))
    return "".join(run + rng.choice(["", "x", _slice(rng)]) for run in runs)


def _controls(rng: random.Random) -> str:
    return "".join(rng.choice([rng.choice(CONTROLS), "a"]) for _ in range(rng.randrange(1, 20)))


def _characters(rng: random.Random) -> str:
    low, high = rng.choice(BLOCKS)
    return "".join(chr(rng.randrange(low, high)) for _ in range(rng.randrange(1, 40)))


def _broken_utf8(rng: random.Random) -> str:
    """What other programs make of broken UTF-8: replacement characters in odd places."""
    data = bytearray(_slice(rng).encode())
    for _ in range(rng.randrange(1, 4)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data).decode("utf-8", "replace")
