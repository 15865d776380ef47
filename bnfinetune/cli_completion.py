"""Scripts that complete the command line. They hold all words themselves, so that a Tab starts no Python.

Every shell is told the same: first words, names that end in `=`, and what may stand behind each `=`. Where nothing is
known of a value, files are completed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bnfinetune.cli_verbs import Verb
from bnfinetune.recipe_files import shipped_recipes
from bnfinetune.recipe_keys import RecipeKey, recipe_schema

_WITHOUT_FILES = ("help", "recipes", "schema", "env", "completion")
_KEYS = "KEYS"  # stands for all keys of a recipe in the words of a verb


@dataclass(frozen=True)
class Words:
    """All that can be completed.

    Attributes:
        verbs: Each verb and its summary.
        keys: Each key of a recipe, with `=`, and its help.
        values: Words behind `NAME=`, by name.
        behind: Words that may stand behind each verb; `KEYS` stands for all keys.
    """

    verbs: dict[str, str]
    keys: dict[str, str]
    values: dict[str, list[str]]
    behind: dict[str, list[str]]


def script(shell: str, verbs: Mapping[str, Verb]) -> str:
    """The script for `bash`, `zsh` or `fish`."""
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](words_of(verbs))


def words_of(verbs: Mapping[str, Verb]) -> Words:
    """What the verbs, the schema and the shipped recipes offer."""
    keys = {key.path: key for section in recipe_schema().walk() for key in section.keys}
    behind = {}
    for name, verb in verbs.items():
        own = {"help": [*verbs, *keys], "cp": [*shipped_recipes()], "completion": ["bash", "zsh", "fish"]}.get(name, [])
        behind[name] = [*own, *(f"{option}=" for option in verb.options), *([_KEYS] if verb.takes_overrides else [])]
    values = {path: _values(key) for path, key in keys.items() if _values(key)}
    return Words(
        verbs={name: verb.summary for name, verb in verbs.items()},
        keys={f"{path}=": key.help for path, key in keys.items()},
        values={"recipe": [*shipped_recipes()], **values},
        behind=behind,
    )


def _values(key: RecipeKey) -> list[str]:
    truths = ["true", "false"] if "true | false" in key.allowed else []
    null = ["null"] if key.choices and "null" in key.allowed.split(" | ") else []
    return [*key.choices, *truths, *null]


def _bash(words: Words) -> str:
    values = "\n".join(f'    {name}) found="{" ".join(each)}" ;;' for name, each in words.values.items())
    behind = "\n".join(f'    {verb}) found="{_spelt(each)}" ;;' for verb, each in words.behind.items())
    return f"""\
# Completion of bnfinetune for bash: source <(bnfinetune completion bash)
_bnfinetune() {{
  local line="${{COMP_LINE:0:COMP_POINT}}" found="" keys="{" ".join(words.keys)}"
  local current="${{line##*[[:space:]]}}" verb="${{COMP_WORDS[1]}}"
  COMPREPLY=()
  if [[ $current == *=* ]]; then
    case "${{current%%=*}}" in
{values}
    esac
    # bash takes "=" for the end of a word, unless told otherwise
    local before="" value="${{current#*=}}"
    [[ $COMP_WORDBREAKS == *=* ]] || before="${{current%%=*}}="
    COMPREPLY=($(compgen -P "$before" -W "$found" -- "$value"))
    if [[ -z $found || ${{current%%=*}} == recipe ]]; then
      compopt -o filenames 2>/dev/null
      local IFS=$'\\n'
      COMPREPLY+=($(compgen -P "$before" -f -- "$value"))
    fi
    return
  fi
  case "$verb" in
{behind}
    *) found="recipe= $keys" ;;
  esac
  if ((COMP_CWORD == 1)); then
    found="{" ".join(words.verbs)} recipe= $keys"
  fi
  COMPREPLY=($(compgen -W "$found" -- "$current"))
  if [[ ${{COMPREPLY[*]}} == *= ]]; then
    compopt -o nospace 2>/dev/null
  elif ((!${{#COMPREPLY[@]}})); then
    compopt -o filenames 2>/dev/null
    local IFS=$'\\n'
    COMPREPLY+=($(compgen -f -- "$current"))
  fi
}}
complete -F _bnfinetune bnfinetune
"""


def _zsh(words: Words) -> str:
    values = "\n".join(f"      {name}) found=({' '.join(each)}) ;;" for name, each in words.values.items())
    behind = "\n".join(f"    {verb}) found=({_spelt(each)}) ;;" for verb, each in words.behind.items())
    verbs = "\n".join(f"    {_quoted(f'{name}:{help_text}')}" for name, help_text in words.verbs.items())
    return f"""\
#compdef bnfinetune
# Completion of bnfinetune for zsh: source <(bnfinetune completion zsh)
_bnfinetune() {{
  local -a found keys verbs
  keys=({" ".join(words.keys)})
  verbs=(
{verbs}
  )
  if [[ $PREFIX == *=* ]]; then
    local name="${{PREFIX%%=*}}"
    compset -P '*='
    case $name in
{values}
    esac
    if [[ $name == recipe ]]; then
      compadd -a found
      _files -g '*.(yaml|yml)'
    elif (( $#found )); then
      compadd -a found
    else
      _files
    fi
    return
  fi
  if (( CURRENT == 2 )); then
    _describe verb verbs
    compadd -S '' -- recipe= $keys
    return
  fi
  case $words[2] in
{behind}
    *) found=(recipe= $keys) ;;
  esac
  local before=$compstate[nmatches]
  compadd -S '' -- ${{(M)found:#*=}}
  compadd -- ${{found:#*=}}
  (( compstate[nmatches] > before )) || _files
}}
compdef _bnfinetune bnfinetune
"""


def _fish(words: Words) -> str:
    lines = [
        "# Completion of bnfinetune for fish: bnfinetune completion fish > ~/.config/fish/completions/bnfinetune.fish",
        f"set -g __bnfinetune_verbs {' '.join(words.verbs)}",
    ]
    start, train = "'__fish_is_first_token'", "'not __fish_seen_subcommand_from $__bnfinetune_verbs'"
    lines += [f"complete -c bnfinetune -n {start} -a {name} -d {_quoted(text)}" for name, text in words.verbs.items()]
    without_files = " ".join(verb for verb in words.verbs if verb in _WITHOUT_FILES)
    lines.append(f"complete -c bnfinetune -f -n '__fish_seen_subcommand_from {without_files}'")
    places = {train: ["recipe=", _KEYS]} | {
        f"'__fish_seen_subcommand_from {verb}'": each for verb, each in words.behind.items()
    }
    for place, each in places.items():
        plain = [word for word in each if word != _KEYS]
        if plain:
            lines.append(f"complete -c bnfinetune -n {place} -a {_quoted(' '.join(plain))}")
    taking = [verb for verb, each in words.behind.items() if _KEYS in each]
    keys = f"'not __fish_seen_subcommand_from {' '.join(verb for verb in words.verbs if verb not in taking)}'"
    for key, text in words.keys.items():
        lines.append(f"complete -c bnfinetune -n {keys} -a {key} -d {_quoted(text)}")
    for name, each in words.values.items():
        choices = " ".join(f"{name}={value}" for value in each)
        begun = f"'string match -q -- \"{name}=*\" (commandline -ct)'"
        lines.append(f"complete -c bnfinetune -f -n {begun} -a {_quoted(choices)}")
    return "\n".join(lines) + "\n"


def _spelt(words: list[str]) -> str:
    """Words as a shell script writes them."""
    return " ".join("$keys" if word == _KEYS else word for word in words)


def _quoted(text: str) -> str:
    """In single quotes, which zsh and fish both read as they stand; an apostrophe becomes a typographic one."""
    return "'" + text.replace("'", "\N{RIGHT SINGLE QUOTATION MARK}").replace("\\", "") + "'"
