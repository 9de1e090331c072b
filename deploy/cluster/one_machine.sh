#!/usr/bin/env bash
# one_machine.sh - one bus with two fronts and their ledger, as processes of this machine: to try it out.
#
#   ./one_machine.sh start FOLDER     (PORTS="8081 8082", PYTHON=python3, NODES=1)
#   ./one_machine.sh stop FOLDER
#
# FOLDER has the data of PostgreSQL, the copies of the fronts, the logs and the numbers of the processes. `start` starts
# what does not run: so it also starts a front or a node again that was killed. With NODES=3 the ledger is three nodes
# with the addresses 127.0.0.2 to 127.0.0.4, as on three machines: see node.sh, which has the further variables.
set -eu
umask 077

die() { printf 'one_machine: %s\n' "$1" >&2; exit 2; }

case $#,${1:-} in
  2,start | 2,stop) ;;
  *) die "give start FOLDER, or stop FOLDER" ;;
esac
bus=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}
read -ra ports <<<"${PORTS:-8081 8082}"
mkdir -p "$2"
folder=$(cd "$2" && pwd)
[[ $folder =~ ^[A-Za-z0-9._/-]+$ ]] || die "the path of FOLDER may only have letters, digits and . _ / -"
ledger=$folder/ledger
node_sh=$bus/deploy/cluster/node.sh
single=()
for programs in /usr/lib/postgresql/*/bin; do PATH=$PATH:$programs; done  # where Debian has them

# PostgreSQL does not run as root; then it runs as the user that its package has made.
as_postgres() {
  if [ "$(id -u)" = 0 ]; then (cd / && runuser -u postgres -- env PATH="$PATH" "$@"); else "$@"; fi
}

# True if the front with this port runs. A number in a file may be that of another process by now. Without -ww, ps cuts
# each line to the width that the variable COLUMNS says.
runs() {
  [ -e "$folder/$1.pid" ] && ps -ww -o args= -p "$(<"$folder/$1.pid")" 2>/dev/null | grep -qF -- "--db $folder/$1.db"
}

start_ledger() {
  command -v initdb >/dev/null || die "PostgreSQL is missing: install it (Debian: apt-get install postgresql)"
  mkdir -p "$ledger"
  if [ "$(id -u)" = 0 ]; then chmod 711 "$folder"; chown postgres "$ledger"; fi
  [ -e "$ledger/data" ] || as_postgres initdb -D "$ledger/data" -U postgres -A trust >"$folder/ledger.log"
  if as_postgres pg_ctl -D "$ledger/data" status >/dev/null; then return; fi
  as_postgres pg_ctl -D "$ledger/data" -o "-k $ledger -c listen_addresses=" -l "$ledger/log" -w start >>"$folder/ledger.log" ||
    die "PostgreSQL does not start: see $ledger/log"
}

start_nodes() {
  local node nodes=(m1=127.0.0.2 m2=127.0.0.3 m3=127.0.0.4)
  for node in m1 m2 m3; do
    mkdir -p "$ledger/$node"
    if [ "$(id -u)" = 0 ]; then chmod 711 "$folder" "$ledger"; fi
    if ! [ -e "$ledger/$node/patroni.yml" ]; then
      [ -e "$ledger/secret" ] || head -c 32 /dev/urandom | sha256sum | cut -c -64 >"$ledger/secret"
      cp "$ledger/secret" "$ledger/$node/secret"
      "$node_sh" write "$ledger/$node" "$node" "${nodes[@]}"
    fi
    "$node_sh" start "$ledger/$node"
  done
  read -r _ _ _ patroni <<<"${NODE_PORTS:-2379 2380 5432 8008}"
  for _ in {1..600}; do  # a leader, and a standby that has what it has
    if curl -sf --noproxy '*' "http://127.0.0.2:$patroni/cluster" | grep -q '"quorum_standby"'; then return; fi
    sleep 0.1
  done
  die "the three nodes do not begin to work together: see $ledger/*/*.log"
}

start_front() {
  if runs "$1"; then return; fi
  "$python" "$bus/bus_server.py" --port "$1" --db "$folder/$1.db" "${single[@]}" >>"$folder/$1.log" 2>&1 </dev/null &
  echo $! >"$folder/$1.pid"
  until curl -sf -o /dev/null --noproxy '*' "http://127.0.0.1:$1/healthz"; do
    kill -0 $! 2>/dev/null || die "the front does not start: $(tail -n 1 "$folder/$1.log")"
    sleep 0.1
  done
}

if [ "$1" = start ]; then
  "$python" -c 'import psycopg' 2>/dev/null || die "psycopg is missing: run $python -m pip install 'psycopg[binary]'"
  if [ "${NODES:-1}" = 3 ]; then
    start_nodes
    AGENT_BUS_LEDGER=$(sed 's/^AGENT_BUS_LEDGER=//' "$ledger/m1/front.env")
  else
    start_ledger
    single=(--ledger-single)
    AGENT_BUS_LEDGER="postgresql://postgres@/postgres?host=$ledger"
  fi
  export AGENT_BUS_LEDGER
  urls=
  for port in "${ports[@]}"; do
    start_front "$port"
    urls+=,http://127.0.0.1:$port
  done
  echo "export AGENT_BUS_URL=${urls#,}"
else
  for port in "${ports[@]}"; do
    if runs "$port"; then kill "$(<"$folder/$port.pid")"; fi
  done
  for port in "${ports[@]}"; do  # they say goodbye in the ledger
    for ((tries = 0; tries < 300; tries++)); do
      if ! runs "$port"; then continue 2; fi
      sleep 0.1
    done
    die "the front of port $port did not end within 30 s: see $folder/$port.log"
  done
  if [ -e "$ledger/m1" ]; then
    for node in m1 m2 m3; do "$node_sh" stop "$ledger/$node" & done
    wait
    exit
  fi
  as_postgres pg_ctl -D "$ledger/data" -m fast -w stop >>"$folder/ledger.log" || die "PostgreSQL does not run in $folder"
fi
