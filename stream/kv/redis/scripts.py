"""What the networked store does in one step: Lua scripts, which a server runs whole, with nothing in between.

Prefixes are compared byte by byte: Lua's ``<`` on strings follows the server's locale, and its numbers are doubles,
which hold no 64-bit epoch. A script reads all that it needs before it writes, so what fails, fails before that. A line
calls one command at most: where a server's access list forbids it, some servers tell no more than the line.
"""

import hashlib
import re
from typing import Final, NamedTuple


class Script(NamedTuple):
    """A Lua script, and the hash under which a server that has seen it runs it."""

    text: str
    sha: str


def _script(text: str) -> Script:
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


#: First item of what `PUT` returns.
WRITTEN: Final = 0  # then how many entries were refused
FENCED: Final = 1  # then the epoch that stands against it, 8 bytes
LOST: Final = 2

#: KEYS: the partition's epoch key, its watermark key, the entries' keys.
#: ARGV: the lowest epoch among the entries (8 bytes); the claim (8 bytes) and the watermark's prefix (16 bytes) that
#: this writer knows to be stored, empty where it knows of none; the entries.
PUT: Final = _script("""\
local function prefix(key)
  local stored = redis.call('GETRANGE', key, 0, 15)
  if #stored == 16 then return stored end
end
local function below(a, b, bytes)
  for i = 1, bytes do
    local x, y = string.byte(a, i), string.byte(b, i)
    if x ~= y then return x < y end
  end
  return false
end
local claim = prefix(KEYS[1])
if claim and below(ARGV[1], claim, 8) then return {1, string.sub(claim, 1, 8)} end
if ARGV[2] ~= '' and (not claim or below(claim, ARGV[2], 8)) then return {2} end
if ARGV[3] ~= '' then
  local watermark = prefix(KEYS[2])
  if not watermark or below(watermark, ARGV[3], 16) then return {2} end
end
local writes, refused = {}, 0
for i = 3, #KEYS do
  local old, new = prefix(KEYS[i]), ARGV[i + 1]
  if old and below(new, old, 16) then
    if below(new, old, 8) then return {1, string.sub(old, 1, 8)} end
    refused = refused + 1
  else
    writes[#writes + 1] = KEYS[i]
    writes[#writes + 1] = new
  end
end
if #writes > 0 then redis.call('MSET', unpack(writes)) end
return {0, refused}
""")

#: KEYS: an entry's key; ARGV: the entry.
#: Returns 0 when it was written, 1 when it was refused, the stored epoch (8 bytes) when that is higher.
PUT_ONE: Final = _script("""\
local old = redis.call('GETRANGE', KEYS[1], 0, 15)
if #old == 16 then
  for at = 1, 16 do
    local x, y = string.byte(ARGV[1], at), string.byte(old, at)
    if x > y then break end
    if x < y then
      if at <= 8 then return string.sub(old, 1, 8) end
      return 1
    end
  end
end
redis.call('SET', KEYS[1], ARGV[1])
return 0
""")

#: What `REPLACE_ONE` returns where there is no entry.
ABSENT: Final = 2

#: The same, but an entry that is not there stays away: returns 2.
REPLACE_ONE: Final = _script(f"if redis.call('EXISTS', KEYS[1]) == 0 then return {ABSENT} end\n{PUT_ONE.text}")

#: KEYS: the shared record, keys to set beside it, keys to remove.
#: ARGV: the record as it was read (empty: none), the new one, how many keys are to be set, their values.
#: Returns 1 when the new record stands; it may have done so before, if the answer to an earlier call was lost.
REPLACE_META: Final = _script("""\
local stored = redis.call('GET', KEYS[1]) or ''
if stored == ARGV[2] then return 1 end
if stored ~= ARGV[1] then return 0 end
local sets, writes = tonumber(ARGV[3]), {KEYS[1], ARGV[2]}
for i = 1, sets do
  writes[#writes + 1] = KEYS[i + 1]
  writes[#writes + 1] = ARGV[i + 3]
end
redis.call('MSET', unpack(writes))
for i = sets + 2, #KEYS do redis.call('DEL', KEYS[i]) end
return 1
""")

#: KEYS: entries; ARGV: an epoch (8 bytes), entries of a higher one stay.
REMOVE: Final = _script("""\
for i = 1, #KEYS do
  local stored, above = redis.call('GETRANGE', KEYS[i], 0, 7), false
  for at = 1, #stored do
    local x, y = string.byte(stored, at), string.byte(ARGV[1], at)
    if x ~= y then above = x > y break end
  end
  if not above then redis.call('DEL', KEYS[i]) end
end
return 1
""")

#: KEYS: one key; ARGV: the value that is removed, another one stays.
REMOVE_IF: Final = _script("""\
if redis.call('GET', KEYS[1]) == ARGV[1] then
  redis.call('DEL', KEYS[1])
end
return 1
""")

#: KEYS: one; set to nothing if it is there.
SET_IF_THERE: Final = _script("redis.call('SET', KEYS[1], '', 'XX')\n")

_SCRIPTS: Final = (PUT, PUT_ONE, REPLACE_ONE, REPLACE_META, REMOVE, REMOVE_IF, SET_IF_THERE)
_ALL: Final = {script.sha: script.text for script in _SCRIPTS}
_PLACE: Final = re.compile(r"([0-9a-f]{40})\b.*@user_script:(\d+)")
_CALL: Final = re.compile(r"redis\.call\('([A-Z]+)'")


def command_at(error: str) -> str | None:
    """The command, in small letters, on the line of a script of ours that an error names; None where it names none."""
    if (place := _PLACE.search(error)) is None:
        return None
    lines = _ALL.get(place[1], "").splitlines()
    number = int(place[2])
    call = _CALL.search(lines[number - 1]) if 0 < number <= len(lines) else None
    return call[1].lower() if call else None
