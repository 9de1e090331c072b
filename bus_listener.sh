#!/usr/bin/env bash
# bus_listener.sh - writes the mail of one name to disk, unattended. Needs bash 3.2, curl and jq.
#
#   AGENT_BUS_URL=http://host:8080 ./bus_listener.sh spark &      (INTERVAL=30 seconds, or BLOCK=1)
#
# FULL (NAME.jsonl) has a line of JSON for each message, with the id of its bus. LOG (NAME.log) has a line of TSV for
# each line of FULL: ts, id, from, to, channel, subject or first words. A remark in LOG starts with "#". To rotate the
# two files, rename or remove both together, at any time: we go on in new files. HEARTBEAT is touched after each good
# poll. PID_FILE exists while we run.
#
# Each message is written exactly once, because FULL is the only state: the cursor is its last whole line, and LOG is
# made from it. A kill can only tear the last line. Then `resume` cuts that line off, and the bus sends its message
# again. jq 1.6 rounds numbers to 17 digits, also in FULL, so the cursor is text, or whole microseconds in bash.
#
# AGENT_BUS_TOKEN, or AGENT_BUS_TOKEN_FILE (mode 600), is passed to curl in a file, never on a command line.
# AGENT_BUS_CA names the certificates to trust. These variables may also be in ~/.config/agent-bus/default.env, or in
# PROFILE.env for AGENT_BUS_PROFILE; the URL may be unix:/path/of/socket. A bus with several URLs has commas between
# them: after a fault we ask at the next one.
set -u
umask 077
LC_ALL=C  # [a-z] is 26 letters

[ -n "${HOME:-}" ] || unset HOME  # if it is empty, ~ would be the root folder

say() { printf 'bus_listener: %s\n' "$1" >&2; }
die() { say "$2"; exit "$1"; }

# A file name that stays in its folder, and is unique even where A and a are the same file.
encode() {
  local i
  for ((i = 0; i < ${#1}; i++)); do
    case ${1:i:1} in
      [a-z0-9._-]) printf %s "${1:i:1}" ;;
      *) printf '%%%02X' "'${1:i:1}" ;;
    esac
  done
}

# A lock of the kernel, not a pid in a file: it is held until the last process that has the descriptor ends. A jq that
# still writes after its listener was killed is such a process. macOS has perl, but not flock(1).
# Status 1: another process has the lock. 2: locks do not work here.
lock() {
  local said='' status
  if command -v flock >/dev/null; then
    said=$(flock -n "$1" 2>&1)
  else
    perl -MErrno -e 'open F, ">&=", shift; exit(flock(F, 6) ? 0 : $!{EWOULDBLOCK} ? 1 : 2)' "$1" 2>/dev/null
  fi
  status=$?
  [ "$status$said" != 1 ] || return 1  # busybox returns 1 for every error, and prints which
  [ "$status" -eq 0 ] || return 2
}

# Lock these files for us alone, or end.
lock_files() {
  local fd dir=.
  [[ $FULL != */* ]] || dir=${FULL%/*}
  for fd in "$@"; do
    for _ in {1..10}; do
      lock "$fd"
      case $? in
        0) continue 2 ;;
        2) die 2 "locks do not work in $dir: set AGENT_BUS_STATE_DIR to a local folder$no_tool" ;;
      esac
      sleep 0.2
    done
    die 2 "another listener writes to $LOG, $FULL or $PID_FILE"
  done
}

refuse_links() {
  local file
  for file in "$@"; do
    [ ! -L "$file" ] || die 2 "$file is a symbolic link: remove it"
  done
}

# LOG and FULL may have been renamed or removed. Then open new files with these names.
reopen() {
  if [ "$LOG" -ef /dev/fd/8 ] && [ "$FULL" -ef /dev/fd/9 ]; then return; fi
  refuse_links "$LOG" "$FULL"
  { exec 8>>"$LOG" 9>>"$FULL"; } 2>/dev/null || return
  lock_files 8 9
  resume  # FULL is new, so LOG begins anew too
}

# A signal ends the wait at once. The command may outlive a kill -9 by a whole poll, so it does not get the locks.
patiently() { "$@" 6>&- 7>&- 8>&- 9>&- & wait $!; }

# Of LOG, FULL or ANSWER. Nothing if the file was renamed or removed just now.
last_line() { tail -n 1 "$1" 2>/dev/null; }

cut_torn_line() {
  local torn size
  if [ -s "$1" ] && [ "$(last_line "$1" | wc -l)" -ne 1 ]; then
    torn=$(last_line "$1" | wc -c)
    size=$({ wc -c <"$1"; } 2>/dev/null) && dd if=/dev/null of="$1" bs=1 seek=$((size - torn)) 2>/dev/null
  fi
}

# `line` makes one line of any text: it replaces tabs, newlines, control, bidi and invisible characters by blanks: those
# of HIDDEN in bus_recv.py and all others of these categories. A sentence of the bus may be longer.
# shellcheck disable=SC2016 # $most is of jq
LINE='def line($most): tostring | .[:$most] | gsub("[\\p{Cc}\\p{Cf}\\p{Zl}\\p{Zp}\\x{34F}\\x{115F}\\x{1160}'\
'\\x{17B4}\\x{17B5}\\x{180B}-\\x{180F}\\x{2065}\\x{2800}\\x{3164}\\x{FE00}-\\x{FE0F}\\x{FFA0}'\
'\\x{FFF0}-\\x{FFF8}\\x{E0000}-\\x{E0FFF}]+"; " "); def line: line(100); def row:
  (if (.subject // "") == "" then .msg else .subject end) as $about
    | [.ts, .id, .from, .to, .channel, $about | . // "" | line] | @tsv;'  # a message in LOG

summary() {
  jq -rR "$LINE"'(fromjson? | objects) // {msg: "(this line of FULL is damaged)"} | row' | cat 2>/dev/null  # as in receive
}

# Makes a cursor, bus and since, of three lines on stdin: the bus, id and ts of a message. Without them since is empty.
take_place() {
  local id
  { read -r bus; read -r id; read -r since; }
  # Bash arithmetic would run code in a text, so check first that the id is hexadecimal. Without a bus id it is no tick.
  # Nor is it one if it is not the ts: only that was compared with our clock.
  if [ -n "$bus" ] && [[ $id =~ ^[0-9a-f]{1,13}$ ]] && [ $((16#$id / 1000000)) = "${since%.*}" ]; then
    since=$(printf '%d.%06d' $((16#$id / 1000000)) $((16#$id % 1000000)))
  fi
}

# After this, both files end with a whole line, the cursor is that of FULL's last message, and LOG has a line for each
# line of FULL. While FULL is empty, as after a rotation, the cursor stays as it is.
resume() {
  local logged stored its_place="$since $bus"
  cut_torn_line "$FULL"
  cut_torn_line "$LOG"
  if [ -s "$FULL" ]; then
    take_place < <(last_line "$FULL" | jq -r "$LINE"'.bus, (.id // "" | line), .ts' 2>/dev/null)
    [ -n "$since" ] || [ ! -e "$FULL" ] || die 2 "the last line of $FULL is not a message: move that file away"
  fi
  if [ ! -e "$FULL" ]; then  # it was renamed just now
    [ -n "$since" ] || read -r since bus <<<"$its_place"
    return 0
  fi
  logged=$(grep -vc '^#' "$LOG" 2>/dev/null)
  [ -n "$logged" ] || return 0  # it was renamed just now, too
  stored=$({ wc -l <"$FULL"; } 2>/dev/null)
  if [ "$logged" -gt "${stored:-$logged}" ]; then : >"$LOG"; logged=0; fi  # FULL was moved away, or lost to a power cut
  [ "$logged" -lt "${stored:-$logged}" ] || return 0
  tail -n +$((logged + 1)) "$FULL" 2>/dev/null | summary >&8
}

# Write a remark to LOG, once, even if a restarted listener has the same remark.
remark() {
  say "$1"
  [ "$(last_line "$LOG")" = "# $1" ] || printf '# %s\n' "$1" >&8
}

# Writes HEAD, and ANSWER: the body, then the status on a line of its own. They are new files each time, because a curl
# that outlived a kill -9 still writes to the old ones.
poll() {
  local blocks=$block
  [ -z "$greeting" ] || blocks=false
  rm -f "$ANSWER" "$HEAD"
  patiently "${CURL[@]}" -D "$HEAD" --data-urlencode "to=$AGENT_NAME" --data-urlencode "channel=$channel" \
    -d "since=$since" ${bus:+--data-urlencode "bus=$bus"} -d max=50 -d "block=$blocks" -d "wait=$hold" \
    "$base/recv" >"$ANSWER"
}

# Tell the bus that we end, and up to where we have written its mail. Else it finds that out by itself, later.
leave() {
  [ -n "$bus" ] && [ -z "$fault" ] && "${CURL[@]}" --max-time 2 --data-urlencode "to=$AGENT_NAME" \
    --data-urlencode "channel=$channel" -d "since=$since" --data-urlencode "bus=$bus" \
    -d peek=true -d ack=true -d leave=true -d max=1 "$base/recv" 6>&- 7>&- 8>&- 9>&- >/dev/null
}

# Prints what ANSWER says, in one start of jq, which takes longer than all else here. First comes a number: how many
# bytes of texts follow. They are one per line, and `texts` makes facts of them: "mail", the bus id, the number of
# messages, a gap, the id and ts of the last message, and the lines of LOG; or "refused" and the reason. Then come the
# lines of FULL. It prints "ahead" in place of "mail" if the answer would move the cursor to more than 300 s ahead of
# both the present cursor and our clock; and nothing if it is no answer of a bus.
verdict() {
  jq -acs --arg since "$since" "$LINE"'def said: (map(length + 3) | add), .[]; . as [$body, $status]
    | if ($body | type) != "object" then empty
      elif $status == 200 and ($body.now | type) == "number" and ($body.messages | type) == "array"
          and all($body.messages[]; type == "object" and (.ts | type) == "number" and .ts >= 1) then
        ($body.bus // "" | line | gsub("^ +| +$"; "")) as $bus | ($body.messages[-1:][0] // {}) as $last
        | ([$body.messages[].ts, ($body | select(.messages == [] and .bus).now)] | max) as $latest
        | [(if $latest > ([now, ($since | tonumber? // 0)] | max) + 300 then "ahead" else "mail" end),
          $bus, ($body.messages | length | tostring),
          ($body.gap | if . then "gap: mail from \(.from) to \(.to) was removed before it was read" | line else "" end),
          ($last.id // "", $last.ts // "" | line), ($body.messages[] | row) | @uri] | said,
        ($body.messages[] + {bus: $bus})  # it replaces a `bus` that the sender gave
      elif $status >= 400 and $status < 500 and ([408, 425, 429] | index($status) | not) and $body.error then
        ["refused", ($body.error | line(1000)) | @uri] | said
      else empty end' "$ANSWER" 2>/dev/null
}

# Makes the array facts of the texts of a verdict. They come in the encoding of URLs: so each is a line of ASCII.
texts() {
  local IFS=$'\n' fact byte='\x'
  facts=()
  set -f  # a text may have a *
  for fact in $1; do
    fact=${fact//\"/}
    printf -v fact %b "${fact//\%/$byte}"
    facts+=("$fact")
  done
  set +f
}

# True if an answer is "ahead" for the third time, and the /healthz of the same bus has the same time. Then our clock is
# wrong, or the clock of the bus was wrong for a while.
is_confirmed() {
  [ "$doubts" -ge 2 ] && [ -n "$its_bus" ] &&
    "${CURL[@]}" --max-time 10 "$base/healthz" 6>&- 7>&- 8>&- 9>&- | jq -es --slurpfile answer "$ANSWER" '
      .[0].ok == true and .[0].bus == $answer[0].bus
      and .[0].now > ([$answer[0].now, $answer[0].messages[].ts] | max) - 300' >/dev/null 2>&1
}

NOW='"now": ?([0-9]{1,10}(\.[0-9]{1,6})?)[,}]'  # its exact text
WAIT=':[[:space:]]*([0-9]{1,9})[[:space:]]*$'  # of Retry-After, unless that is a date

# End, unless only its owner can read this file.
private() {
  [ -r "$1" ] || die 2 "$1 cannot be read"
  # shellcheck disable=SC2012 # only the mode is read; stat(1) has other options on each system
  case $(ls -dlL "$1") in ????------*) ;; *) die 2 "other users can read $1: chmod 600 $1" ;; esac
}

# Takes the variables AGENT_... of the configuration file, as `settings` of bus_recv.py does: the environment is above
# it, and nothing is taken if AGENT_BUS_URL in the environment has a URL that the file has not.
configure() {
  local line one variable number=0 profile=${AGENT_BUS_PROFILE:-default} file_AGENT_BUS_URL='' file
  local pair='^[[:space:]]*([#;].*|([A-Za-z_][A-Za-z0-9_]*)=([^[:space:]'\''"\][^\]*)?)?$'
  [[ $profile =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || die 2 "AGENT_BUS_PROFILE must be the name of a file, without .env"
  file=${XDG_CONFIG_HOME:-${HOME-~}/.config}/agent-bus/$profile.env
  if [ "$profile" = default ] && [ ! -e "$file" ] && { [ -x "${file%/*}" ] || [ ! -d "${file%/*}" ]; }; then return; fi
  private "$file"
  [ -O "$file" ] || die 2 "$file belongs to another user: make a file of your own"
  while IFS= read -r line || [ -n "$line" ]; do
    number=$((number + 1))
    [ $number -gt 1 ] || line=${line#$'\xef\xbb\xbf'}
    line=${line%"${line##*[![:space:]]}"}
    [[ $line =~ $pair ]] || die 2 "line $number of $file: write KEY=VALUE, without quotes, \\ or export"
    [[ ${BASH_REMATCH[2]:-} != AGENT_* ]] || local "file_${BASH_REMATCH[2]}=${BASH_REMATCH[3]:-}"
  done <"$file"
  line=${file_AGENT_BUS_URL:-http://127.0.0.1:8080},
  IFS=, read -ra urls <<<"${AGENT_BUS_URL:-$line}"
  for one in "${urls[@]}"; do
    [[ ,${line//\/,/,} == *",${one%/},"* ]] || return
  done
  [ -z "${AGENT_BUS_TOKEN_FILE:-}" ] || unset file_AGENT_BUS_TOKEN
  for variable in $(compgen -v file_AGENT_); do
    line=${variable#file_}
    [ -n "${!line:-}" ] || printf -v "$line" %s "${!variable}"
  done
}

# Take an answer of the bus: write its messages, move the cursor, or note that another bus answers.
receive() {
  if [ "$its_bus" != "$bus" ] && [ "$since" != last ]; then  # `last` means the same on every bus, a number does not
    remark "another bus answers: $its_bus in place of $bus"
    bus='' since=last
    return
  fi
  bus=$its_bus
  [ -z "$gap" ] || remark "$gap"
  if [ "$count" -gt 0 ] || [ -n "$short" ]; then
    # cat ends with the first write that fails; printf might go on behind a hole, once there is room again
    [ "$count" = 0 ] || printf '%s\n' "$lines" | cat 2>/dev/null >&9
    local wrote=$((PIPESTATUS[0] + ${PIPESTATUS[1]:-0}))
    # Not from FULL, which may be renamed or removed at any moment: it has these messages, and they come only once.
    if [ "$wrote" -eq 0 ] && [ "$count" -gt 0 ]; then take_place < <(printf '%s\n' "$bus" "${facts[@]:4:2}"); fi
    if [ "$wrote" -eq 0 ] && [ -z "$short" ]; then printf '%s\n' "${facts[@]:6}" | cat 2>/dev/null >&8; return; fi
    resume && return $wrote  # a full disk may have left FULL or LOG short
    return 1
  elif [ -n "$bus" ] && [[ $(<"$ANSWER") =~ $NOW ]]; then  # without a bus id `now` may be a clock that runs ahead
    since=${BASH_REMATCH[1]}  # only in memory: a restart asks again from the last message, which is harmless
  fi
}

# Writes ANSWER to FULL and LOG. Prints two lines: news and the values for the next poll, then a sentence. `pause` is
# how long (s) we are asked to wait. It runs in a subshell, because bash 5.2 loses a signal that arrives while it reads
# a "$(", and the loop must not lose one.
digest() (
  news=fault sentence="no answer from $url (curl $1)" pause=0 status=$(last_line "$ANSWER")
  answer=$(verdict) || answer=''
  size=${answer:0:9}  # a search for the end of the texts would take minutes in an answer of many megabytes
  size=${size%%$'\n'*}
  texts "${answer:${#size}+1:size}"
  lines=${answer:${#size}+1+size}
  verdict=${facts[0]:-} its_bus=${facts[1]:-} count=${facts[2]:-} gap=${facts[3]:-}
  case $1,$status,$since,$verdict in
    0,*,mail | 0,*,ahead)
      if [ "$bus$since" = 0 ] && [ -n "$its_bus" ]; then  # it knows the word `last`; the error before was another one
        news=rest since=last
      elif [ "$verdict" = ahead ] && ! is_confirmed; then
        news=doubt sentence="the time of $url is far ahead of ours, so the cursor stays: is it a bus? Is a clock wrong?"
      elif receive; then
        [ "$count" -gt 0 ] && news=again || news=rest
      else
        news=short sentence="cannot write to $LOG or $FULL"
      fi ;;
    # A server of the first contract does not know the word `last`; some then drop the connection.
    0,400,last,* | 52,*,last,* | 56,*,last,*) news=again since=0 ;;
    0,*,refused) news=refused sentence=$its_bus ;;
    35,*) sentence+="; if this port speaks http, set AGENT_BUS_URL=http${base#https}" ;;
    52,* | 56,*) [[ $base != http:* ]] || sentence+="; if this port speaks https, set AGENT_BUS_URL=https${base#http}" ;;
    60,*) sentence+=": its certificate is not trusted here; set AGENT_BUS_CA to its file, or join anew if the bus has a new key" ;;
    0,429,* | 0,503,*)
      sentence="$url answers $status: not now"
      [[ $(grep -i '^retry-after:' "$HEAD" 2>/dev/null) =~ $WAIT ]] && pause=$((10#${BASH_REMATCH[1]})) ;;
    0,50[24],* | 0,524,*) sentence="$url answers $status" hold=$(((hold + 1) / 2)) ;;  # a proxy with a shorter timeout
    0,*) sentence="$url answers $status, and it is not a bus's answer" ;;
  esac
  printf '%s\n' "$news $hold $pause $since $bus" "$sentence"
)

# Ask at the next URL. If all have failed, print a line when the reason changes, then pause. The pauses double up to a
# minute. One for which we were asked is as long as that, up to 15 minutes.
fault() {
  local pause=$((delay - RANDOM % (delay / 2 + 1))) asked=${2:-0}
  faults=$((faults + 1))
  use $((faults % ${#urls[@]}))
  [ $((faults % ${#urls[@]})) = "$answered" ] || return 0
  [ "$1" = "$fault" ] || say "$1; trying again"
  [ "$asked" -le $pause ] || pause=$((asked < 900 ? asked : 900))
  patiently sleep $pause
  fault=$1 delay=$((delay < 30 ? delay * 2 : 60))
}

usage='usage: AGENT_BUS_URL=http://host:8080 ./bus_listener.sh [NAME]

Writes the mail of NAME (or AGENT_NAME) to disk, unattended: to ~/.local/state/agent-bus/listener/NAME.jsonl and .log.
It takes no options, only these variables:
  AGENT_BUS_URL, AGENT_NAME, AGENT_BUS_CHANNEL, AGENT_BUS_TOKEN or AGENT_BUS_TOKEN_FILE, AGENT_BUS_CA,
  AGENT_BUS_PLAIN_HTTP, AGENT_BUS_UA, AGENT_BUS_PROFILE  as README.md says
  BLOCK=1                     long polls, in place of one poll each INTERVAL seconds (30)
  AGENT_BUS_STATE_DIR         where the files are; or LOG, FULL, HEARTBEAT, PID_FILE: the path of each'
case $#,${1:-} in
  0,) ;;
  1,[!-]*) export AGENT_NAME=$1 ;;
  *,-h | *,--help) printf '%s\n' "$usage"; exit ;;
  *) die 2 "$(printf %q "$1") is not understood: it takes one NAME and no options, only variables; see --help" ;;
esac
no_tool=''
command -v flock >/dev/null || command -v perl >/dev/null || no_tool=', and install flock or perl'
for tool in curl jq; do command -v $tool >/dev/null || die 2 "$tool is not installed"; done
configure
url=${AGENT_BUS_URL:-http://127.0.0.1:8080} channel=${AGENT_BUS_CHANNEL:-default}
grammar='^[A-Za-z0-9][A-Za-z0-9._:@-]{0,63}$'
IFS=, read -ra urls <<<"$url,"
for one in "${urls[@]}"; do
  [[ $one =~ ^(https?://|unix:/). ]] || die 2 "AGENT_BUS_URL must start with http://, https:// or unix:/"
  [[ $one != *@* || $one == unix:* ]] || die 2 "the URL of the bus has a login (user@): remove it; a bus takes the token in AGENT_BUS_TOKEN"
done
[ -n "${AGENT_NAME:-}" ] || die 2 "the name is missing: give NAME, or set AGENT_NAME"
[[ $AGENT_NAME =~ $grammar ]] || die 2 "'${AGENT_NAME//[[:cntrl:]]/?}' is not a name: give up to 64 letters, digits and ._:@-"
[[ $channel =~ $grammar ]] || die 2 "the channel '${channel//[[:cntrl:]]/?}' is not a name: give up to 64 letters, digits and ._:@-"
block=false rest=${INTERVAL:-30} hold=25  # s; common proxies cut a request that is quiet for 30
[ "${BLOCK:-0}" = 0 ] || block=true rest=${INTERVAL:-1}  # s; a bus that is shutting down answers each poll at once
[[ $rest =~ ^[0-9]+(\.[0-9]+)?$ ]] || die 2 "INTERVAL must be a number of seconds"
# --speed-time: s without a byte, longer than a server parks us. --max-time: s; enough for a slow line, not for a drip.
# --max-filesize: bytes, well above 50 messages of 256 KiB.
OPTIONS=(-q -g -G -s --proto '=http,https' -A "${AGENT_BUS_UA:-Mozilla/5.0}" -w '\n%{http_code}'
  --connect-timeout 10 --speed-limit 1 --speed-time 40 --max-time 300 --max-filesize 67108864
  --noproxy "localhost,127.0.0.1,::1,${no_proxy:-${NO_PROXY:-}}")

# From now on, ask at this one of the URLs.
use() {
  base=${urls[$1]%/} CURL=(curl "${OPTIONS[@]}")
  if [[ $base == unix:* ]]; then CURL+=(--unix-socket "${base#unix:}") base=http://localhost; fi
}
[ -z "${AGENT_BUS_CA:-}" ] || OPTIONS+=(--cacert "$AGENT_BUS_CA")
strip() {
  token=${token#$'\xef\xbb\xbf'}
  token=${token#"${token%%[![:space:]]*}"}
  token=${token%"${token##*[![:space:]]}"}
}
token=${AGENT_BUS_TOKEN:-}
strip  # strip a byte order mark, blanks and empty lines
if [ -z "$token" ] && [ -n "${AGENT_BUS_TOKEN_FILE:-}" ]; then
  private "$AGENT_BUS_TOKEN_FILE"
  { token=$(<"$AGENT_BUS_TOKEN_FILE"); } 2>/dev/null
  strip
fi
[[ $token =~ ^[!-~]*$ ]] || die 2 "the token has blanks or other characters that no token has: copy it again"
here='^(https://|unix:|http://(localhost|127(\.[0-9]+){3}|\[::1\])([:/]|$))'
for one in "${urls[@]}"; do
  if [ -n "$token" ] && ! [[ $one =~ $here || ${AGENT_BUS_PLAIN_HTTP:-} ]]; then
    die 2 "the token would cross the network in the clear: use https; in a tunnel or VPN set AGENT_BUS_PLAIN_HTTP=1"
  fi
done

dir=${AGENT_BUS_STATE_DIR:-${XDG_STATE_HOME:-"~/.local/state"}/agent-bus}/listener
if [[ $dir == \~/* ]]; then
  home=${HOME-~}  # the home of this user, if HOME is not set
  [[ $home == /* ]] || die 2 "there is no home directory: set AGENT_BUS_STATE_DIR"
  dir=$home/${dir#??}
fi
{ mkdir -p "$dir" && chmod 700 "$dir"; } 2>/dev/null ||
  die 2 "cannot write to $dir: set AGENT_BUS_STATE_DIR"
name=$AGENT_NAME
[ "$channel" = default ] || name+=/$channel
name=$(encode "$name")
# A file system takes 255 bytes, and we add some: a longer name ends with a sum of the whole.
[ ${#name} -le 240 ] || name=${name:0:210}.$(cksum <<<"$name" | tr " " .)
name=$dir/$name
LOG=${LOG:-$name.log} FULL=${FULL:-$name.jsonl} HEARTBEAT=${HEARTBEAT:-$name.heartbeat} PID_FILE=${PID_FILE:-$name.pid}
ANSWER=$FULL.answer HEAD=$FULL.head WHO=$FULL.token
refuse_links "$LOG" "$FULL" "$HEARTBEAT" "$PID_FILE" "$ANSWER" "$HEAD" "$WHO"
{ exec 7>>"$PID_FILE" 8>>"$LOG" 9>>"$FULL"; } 2>/dev/null || die 2 "cannot write to $LOG, $FULL or $PID_FILE"
lock_files 7 8 9
fault='' delay=1 doubts=0 bus='' since=last faults=0 answered=0  # before the trap, which needs them
short=''  # not empty: a write has failed, so LOG or FULL may be short
trap 'kill $(jobs -p) 2>/dev/null; wait 2>/dev/null; rm -f "$PID_FILE" "$ANSWER" "$HEAD"; leave; rm -f "$WHO"' EXIT
echo $$ >"$PID_FILE"
[ -z "$token" ] || { printf 'Authorization: Bearer %s\n' "$token" >"$WHO" && OPTIONS+=(-H "@$WHO"); } || exit
rm -f "$ANSWER"
mkfifo "$ANSWER" && exec 6<>"$ANSWER" || exit  # carries the output of digest; a pipe works even if the disk is full
use 0
resume || { short=1; fault "cannot write to $LOG"; }
trap 'exit 0' HUP TERM
trap 'exit 130' INT
greeting="writing the mail of $AGENT_NAME to $LOG and $FULL"  # until the bus has answered; that poll is a short one
[ ! -t 2 ] || say "asking $url for the mail of $AGENT_NAME"

while :; do
  poll
  polled=$?
  reopen || { short=1; fault "cannot write to $LOG or $FULL"; continue; }
  digest $polled >&6 || exit
  read -r news hold pause since bus <&6
  read -r sentence <&6
  case $news in
    fault) fault "$sentence" "$pause" ;;
    short) short=1; fault "$sentence" ;;
    doubt) doubts=$((doubts + 1)); fault "$sentence" ;;
    refused) die 1 "$sentence" ;;
    *)
      [ -z "$greeting" ] || echo "$greeting"
      [ -z "$fault" ] || say "it works again"
      greeting='' fault='' short='' delay=1 doubts=0 answered=$((faults % ${#urls[@]}))
      touch "$HEARTBEAT"
      [ "$news" = again ] || patiently sleep "$rest" ;;
  esac
done
