#!/usr/bin/env bash
# node.sh - one node of a ledger on three machines: etcd, and PostgreSQL under Patroni (README.md, beside this).
#
#   ./node.sh write FOLDER NAME NAME=ADDRESS NAME=ADDRESS NAME=ADDRESS     the configuration of the node NAME
#   ./node.sh start FOLDER                     both, in the background
#   ./node.sh stop FOLDER
#   ./node.sh run FOLDER etcd|patroni          one of them, until it ends: for systemd
#
# FOLDER/secret must be there, and the same on all machines. PATRONI=/opt/patroni/bin/patroni; NODE_PORTS="2379 2380 5432
# 8008" are those of etcd for its clients and for the other etcd, of PostgreSQL, and of Patroni. Run as root, everything
# runs as the user postgres, because PostgreSQL refuses to run as root.
set -eu
umask 077

die() { printf 'node: %s\n' "$1" >&2; exit 2; }

use() { die "give write FOLDER NAME and three times NAME=ADDRESS, or start FOLDER, stop FOLDER, run FOLDER etcd, run FOLDER patroni"; }

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
for programs in /usr/lib/postgresql/*/bin; do PATH=$programs:$PATH; done  # where Debian has them; the newest comes first
if [ "$(id -u)" = 0 ]; then owner=postgres as=(setpriv --reuid=postgres --regid=postgres --init-groups); else owner=$(id -un) as=(); fi

password() { printf '%s of %s' "$1" "$(<"$folder/secret")" | sha256sum | cut -c -40; }

# A file of the folder, made of the one beside this script.
made() { sed "$filled" "$here/$1" >"$folder/$1"; }

write() {
  local name=$1 etcd peer postgres patroni one address='' peers='' clients='' hosts='' nodes=''
  shift
  [ -s "$folder/secret" ] || die "$folder/secret is missing: make it on one machine, and copy it to the others (README.md)"
  command -v initdb >/dev/null || die "PostgreSQL is missing: install it (Debian: apt-get install postgresql)"
  read -r etcd peer postgres patroni <<<"${NODE_PORTS:-2379 2380 5432 8008}"
  for one; do
    [[ $one =~ ^[a-z0-9-]+=[0-9.]+$ ]] || die "$one is not NAME=ADDRESS, with a name of a-z, 0-9 and -, and an IPv4 address"
    [ "${one%=*}" != "$name" ] || address=${one#*=}
    peers+=,${one%=*}=http://${one#*=}:$peer
    clients+=", '${one#*=}:$etcd'"
    hosts+=,${one#*=}:$postgres
    nodes+=", 'host all all ${one#*=}/32 scram-sha-256', 'host replication all ${one#*=}/32 scram-sha-256'"
  done
  [ -n "$address" ] || die "none of the three is $name=ADDRESS"
  filled="s|@NAME@|$name|; s|@ADDRESS@|$address|; s|@FOLDER@|$folder|; s|@PROGRAMS@|$(dirname "$(command -v initdb)")|
    s|@PEERS@|${peers#,}|; s|@CLIENTS@|${clients#, }|; s|@NODES@|${nodes#, }|; s|@BUS@|$(password bus)|
    s|@ETCD@|$etcd|; s|@PEER@|$peer|; s|@POSTGRES@|$postgres|; s|@PATRONI@|$patroni|; s|@SECRET@|$(password node)|"
  made etcd.yml
  made patroni.yml
  made database.sql
  echo "AGENT_BUS_LEDGER=postgresql://bus:$(password bus)@${hosts#,}/bus" >"$folder/front.env"
  chown -R "$owner" "$folder"
}

run() {
  cd "$folder"
  case $1 in
    etcd) exec "${as[@]}" etcd --config-file "$folder/etcd.yml" ;;
    patroni) exec "${as[@]}" "${PATRONI:-/opt/patroni/bin/patroni}" "$folder/patroni.yml" ;;
    *) use ;;
  esac
}

# True if this one runs. A number in a file may be that of another process by now. Without -ww, ps cuts each line to the
# width that the variable COLUMNS says.
runs() {
  [ -e "$folder/$1.pid" ] && ps -ww -o args= -p "$(<"$folder/$1.pid")" 2>/dev/null | grep -qF -- "$folder/$1.yml"
}

start() {
  if runs "$1"; then return; fi
  (run "$1") >>"$folder/$1.log" 2>&1 </dev/null &
  echo $! >"$folder/$1.pid"
}

stop() {
  if ! runs "$1"; then return; fi
  kill "$(<"$folder/$1.pid")"
  for _ in {1..600}; do
    if ! runs "$1"; then return; fi
    sleep 0.1
  done
  die "$1 did not end within 60 s: see $folder/$1.log"
}

[ $# -ge 2 ] || use
folder=$(mkdir -p "$2" && cd "$2" && pwd)
[[ $folder =~ ^[A-Za-z0-9._/-]+$ ]] || die "the path of FOLDER may only have letters, digits and . _ / -"
case $1,$# in
  write,6) write "${@:3}" ;;
  start,2)
    [ -e "$folder/patroni.yml" ] || die "there is no $folder/patroni.yml: run write first"
    start etcd
    start patroni
    ;;
  stop,2)
    stop patroni
    stop etcd
    ;;
  run,3) run "$3" ;;
  *) use ;;
esac
