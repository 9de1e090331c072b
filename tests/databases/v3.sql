BEGIN TRANSACTION;
CREATE TABLE bus(id TEXT NOT NULL, last INTEGER NOT NULL);
INSERT INTO "bus" VALUES('877e4b9d4ccb16e5',1735689600735962);
CREATE TABLE extensions(name TEXT PRIMARY KEY, version INTEGER NOT NULL, noun TEXT NOT NULL);
INSERT INTO "extensions" VALUES('work',1,'jobs');
CREATE TABLE mailboxes(
        id INTEGER PRIMARY KEY, channel TEXT NOT NULL, name TEXT NOT NULL,
        own INTEGER NOT NULL DEFAULT 0,      -- somebody reads it as their own, first name
        read INTEGER,                        -- highest cursor its owner presented; NULL before the first
        fetched INTEGER NOT NULL DEFAULT 0,  -- highest tick in an answer that was written out
        seen INTEGER NOT NULL DEFAULT 0,     -- wall clock of the last poll, us
        removed INTEGER NOT NULL DEFAULT 0, taken INTEGER NOT NULL DEFAULT 0, gone INTEGER NOT NULL DEFAULT 0,  -- highest tick that retention removed
        UNIQUE(channel, name));
INSERT INTO "mailboxes" VALUES(1,'default','pruned',1,1735689600710545,1735689600735962,1735689600749423,1735689600735962,0,4);
INSERT INTO "mailboxes" VALUES(2,'default','all',0,NULL,1735689603270353,1735689603272473,0,0,0);
INSERT INTO "mailboxes" VALUES(3,'default','never-read',0,NULL,0,0,0,0,0);
INSERT INTO "mailboxes" VALUES(4,'default','fetched-only',1,0,1735689603263308,1735689603268001,0,0,0);
INSERT INTO "mailboxes" VALUES(5,'default','half-way',1,1735689603264241,1735689603266889,1735689603269633,0,0,0);
INSERT INTO "mailboxes" VALUES(6,'default','dell',1,1735689603270352,1735689603270353,1735689603272473,0,0,0);
INSERT INTO "mailboxes" VALUES(7,'default','team',0,NULL,1735689603270353,1735689603272473,0,0,0);
INSERT INTO "mailboxes" VALUES(8,'lab','all',0,NULL,1735689603275307,1735689603276812,0,0,0);
INSERT INTO "mailboxes" VALUES(9,'lab','nano',1,1735689603274302,1735689603275307,1735689603276812,0,0,0);
INSERT INTO "mailboxes" VALUES(10,'default','array',0,NULL,0,0,0,0,0);
INSERT INTO "mailboxes" VALUES(11,'default','texts',0,NULL,0,0,0,0,0);
INSERT INTO "mailboxes" VALUES(12,'default','keys',0,NULL,0,0,0,0,0);
INSERT INTO "mailboxes" VALUES(13,'default','keys-too',0,NULL,0,0,0,0,0);
INSERT INTO "mailboxes" VALUES(14,'lab','keys',0,NULL,0,0,0,0,0);
INSERT INTO "mailboxes" VALUES(15,'default','short',0,NULL,0,0,0,0,0);
INSERT INTO "mailboxes" VALUES(16,'default','spark',0,NULL,0,0,0,0,0);
INSERT INTO "mailboxes" VALUES(17,'default','recalled',0,NULL,0,0,0,0,0);
INSERT INTO "mailboxes" VALUES(18,'default','queue',0,NULL,1735689603295323,1735689603306453,0,1735689603295323,0);
INSERT INTO "mailboxes" VALUES(19,'default','failing',0,NULL,1735689603308467,1735689603350442,0,1735689603308467,0);
INSERT INTO "mailboxes" VALUES(20,'default','failing.dead',0,NULL,0,0,0,0,0);
INSERT INTO "mailboxes" VALUES(21,'default','last-try',0,NULL,1735689603363587,1735689603423639,0,1735689603363587,0);
CREATE TABLE messages(
        tick INTEGER PRIMARY KEY, mailbox INTEGER NOT NULL, n INTEGER NOT NULL, sender TEXT NOT NULL,
        key TEXT, expires INTEGER, depth INTEGER NOT NULL, sum INTEGER NOT NULL, text TEXT NOT NULL, answers INTEGER, thread INTEGER);
INSERT INTO "messages" VALUES(1735689603232481,1,5,'spark',NULL,NULL,0,876517456,'"from": "spark", "channel": "default", "msg": "new 0"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689603239579,1,6,'spark',NULL,NULL,0,838540791,'"from": "spark", "channel": "default", "msg": "new 1"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689603250771,3,1,'spark',NULL,NULL,0,1225555168,'"from": "spark", "channel": "default", "msg": "message 0"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689603260045,4,1,'spark',NULL,NULL,0,72055127,'"from": "spark", "channel": "default", "msg": "message 0"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689603261336,5,1,'dell',NULL,NULL,0,215498069,'"from": "dell", "channel": "default", "msg": "message 0", "subject": "S0"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689603262404,3,2,'spark',NULL,NULL,0,3403900491,'"from": "spark", "channel": "default", "msg": "message 1"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689603263308,4,2,'spark',NULL,NULL,0,1120345294,'"from": "spark", "channel": "default", "msg": "message 1"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689603264241,5,2,'dell',NULL,NULL,0,1252981450,'"from": "dell", "channel": "default", "msg": "message 1", "subject": "S1"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689603265089,3,3,'spark',NULL,NULL,0,3368608551,'"from": "spark", "channel": "default", "msg": "message 2"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689603265890,4,3,'spark',NULL,NULL,0,2131345967,'"from": "spark", "channel": "default", "msg": "message 2"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689603266889,5,3,'dell',NULL,NULL,0,2077631765,'"from": "dell", "channel": "default", "msg": "message 2", "subject": "S2"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689603270352,6,1,'spark',NULL,NULL,0,2646030812,'"from": "spark", "channel": "default", "msg": "to two", "priority": "high"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689603270353,7,1,'spark',NULL,NULL,0,1743582889,'"from": "spark", "channel": "default", "msg": "to two", "priority": "high"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689603273191,7,2,'spark',NULL,NULL,0,2272669241,'"from": "spark", "channel": "default", "msg": "for the group"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689603274302,8,1,'dell',NULL,NULL,0,3215313699,'"from": "dell", "channel": "lab", "msg": "hear me"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689603275307,9,1,'dell',NULL,NULL,0,1747947252,'"from": "dell", "channel": "lab", "msg": "on another channel"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689603277467,10,1,'dell',NULL,NULL,0,1925415714,'"from": "dell", "channel": "default", "msg": "0"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689603277468,10,2,'dell',NULL,NULL,0,22795342,'"from": "dell", "channel": "default", "msg": "1"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689603277469,10,3,'dell',NULL,NULL,0,1984195808,'"from": "dell", "channel": "default", "msg": "2"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689603278595,11,1,'spark',NULL,NULL,0,3172320733,'"from": "spark", "channel": "default", "msg": "line one\n\ttab \"quotes\" \\ '' / \u00e9 \u4e2d \ud83d\udc1d \u2028 -- ; );\n", "x-new": [1, {"a": null, "b": [true, 1.5, -7, "\u00e9"]}], "Msg": "", "type": "result", "content_type": "text/markdown"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689603279504,12,1,'spark','k-1',NULL,0,602043477,'"from": "spark", "channel": "default", "msg": "once"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689603280727,12,2,'spark','k-2',NULL,0,3555361162,'"from": "spark", "channel": "default", "msg": "to both"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689603280728,13,1,'spark','k-2',NULL,0,4130100497,'"from": "spark", "channel": "default", "msg": "to both"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689603281830,14,1,'dell','k-1',NULL,0,660926630,'"from": "dell", "channel": "lab", "msg": "elsewhere", "subject": "S"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689603282883,15,1,'spark',NULL,1735689603283883,0,1853459039,'"from": "spark", "channel": "default", "msg": "gone", "ttl": 0.001',NULL,NULL);
INSERT INTO "messages" VALUES(1735689603283942,15,2,'spark',NULL,2735689603283942,0,4138443292,'"from": "spark", "channel": "default", "msg": "lasting", "ttl": 1000000000.0',NULL,NULL);
INSERT INTO "messages" VALUES(1735689603284793,6,2,'spark',NULL,NULL,0,1333778455,'"from": "spark", "channel": "default", "msg": "a question"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689603285837,16,1,'dell',NULL,NULL,1,676537652,'"from": "dell", "channel": "default", "msg": "an answer", "reply_to": "62a99ba3e7f39"',1735689603284793,1735689603284793);
INSERT INTO "messages" VALUES(1735689603286832,6,3,'spark','thanks',NULL,2,127476353,'"from": "spark", "channel": "default", "msg": "thank you", "reply_to": "62a99ba3e834d"',1735689603285837,1735689603284793);
INSERT INTO "messages" VALUES(1735689603287806,16,2,'dell',NULL,NULL,1,3638437736,'"from": "dell", "channel": "default", "msg": "another answer", "reply_to": "62a99ba3e7f39"',1735689603284793,1735689603284793);
INSERT INTO "messages" VALUES(1735689603288701,17,1,'spark','k-3',1,0,2371391311,'"from": "spark", "channel": "default", "msg": "never mind"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689603289798,17,2,'spark',NULL,NULL,0,2050322492,'"from": "spark", "channel": "default", "msg": "this one stays"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689603291751,18,1,'spark',NULL,NULL,0,2987914484,'"from": "spark", "channel": "default", "msg": "done", "subject": "job done"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689603292739,18,2,'spark',NULL,NULL,0,499367751,'"from": "spark", "channel": "default", "msg": "given back", "subject": "job given back"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689603293591,18,3,'spark',NULL,NULL,0,2495876824,'"from": "spark", "channel": "default", "msg": "later", "subject": "job later"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689603294526,18,4,'spark',NULL,NULL,0,3647997866,'"from": "spark", "channel": "default", "msg": "out", "subject": "job out"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689603295323,18,5,'spark',NULL,NULL,0,3960918658,'"from": "spark", "channel": "default", "msg": "extended", "subject": "job extended"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689603296202,18,6,'spark',NULL,NULL,0,719850574,'"from": "spark", "channel": "default", "msg": "waits", "subject": "job waits"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689603308467,19,1,'spark',NULL,NULL,0,1713628787,'"from": "spark", "channel": "default", "msg": "failing, five times", "subject": "S"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689603359018,20,1,'spark',NULL,NULL,0,1690634984,'"from": "spark", "channel": "default", "msg": "failing, five times", "subject": "S", "dead_of": "62a99ba3edbb3", "attempts": 5, "reason": "it does not compile"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689603363587,21,1,'spark',NULL,NULL,0,270868,'"from": "spark", "channel": "default", "msg": "last-try, five times", "subject": "S"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689603429870,6,4,'spark','ask-1',NULL,0,1966173990,'"from": "spark", "channel": "default", "msg": "anybody?"',NULL,NULL);
CREATE TABLE receipts(
        mailbox INTEGER NOT NULL, kind INTEGER NOT NULL, tick INTEGER NOT NULL,
        reader TEXT NOT NULL, at INTEGER NOT NULL, PRIMARY KEY(mailbox, kind, tick)) WITHOUT ROWID;
INSERT INTO "receipts" VALUES(1,0,1735689600735962,'pruned',1735689600747936);
INSERT INTO "receipts" VALUES(2,0,1735689600735962,'pruned',1735689600747943);
INSERT INTO "receipts" VALUES(2,0,1735689603270353,'dell',1735689603272265);
INSERT INTO "receipts" VALUES(4,0,1735689603263308,'fetched-only',1735689603268361);
INSERT INTO "receipts" VALUES(5,0,1735689603266889,'half-way',1735689603269429);
INSERT INTO "receipts" VALUES(5,1,1735689603264241,'half-way',1735689603269644);
INSERT INTO "receipts" VALUES(6,0,1735689603270353,'dell',1735689603272256);
INSERT INTO "receipts" VALUES(6,1,1735689603270352,'dell',1735689603272486);
INSERT INTO "receipts" VALUES(7,0,1735689603270353,'dell',1735689603272263);
INSERT INTO "receipts" VALUES(8,0,1735689603275307,'nano',1735689603276346);
INSERT INTO "receipts" VALUES(9,0,1735689603275307,'nano',1735689603276343);
INSERT INTO "receipts" VALUES(9,1,1735689603274302,'nano',1735689603276824);
INSERT INTO "receipts" VALUES(18,0,1735689603295323,'dell',1735689603306877);
INSERT INTO "receipts" VALUES(19,0,1735689603308467,'nano',1735689603309837);
INSERT INTO "receipts" VALUES(21,0,1735689603363587,'nano',1735689603377224);
CREATE TABLE uses(token TEXT PRIMARY KEY, used INTEGER NOT NULL);
CREATE TABLE work(
        tick INTEGER PRIMARY KEY, mailbox INTEGER NOT NULL, attempt INTEGER NOT NULL,
        due INTEGER,                         -- when it can be had again, us; NULL when it is done or dead
        lease TEXT,                          -- of who has it; NULL when it was given back, or is dead
        worker TEXT NOT NULL, reason TEXT);
INSERT INTO "work" VALUES(1735689603291751,18,1,NULL,'2e059227429e12ad','dell',NULL);
INSERT INTO "work" VALUES(1735689603292739,18,1,1735689603802516,NULL,'dell','not mine');
INSERT INTO "work" VALUES(1735689603293591,18,1,1735693203304483,NULL,'dell','a worker gave it back');
INSERT INTO "work" VALUES(1735689603294526,18,1,1735689663305373,'186841fa02d183f5','dell',NULL);
INSERT INTO "work" VALUES(1735689603295323,18,1,1735696803307511,'24461da5e63b8446','dell',NULL);
INSERT INTO "work" VALUES(1735689603308467,19,5,NULL,NULL,'nano','it does not compile');
INSERT INTO "work" VALUES(1735689603363587,21,5,1735689663423666,'0c9630bd493f4f1b','nano',NULL);
CREATE INDEX in_order ON messages(mailbox, tick);
CREATE INDEX retries ON messages(key, sender) WHERE key IS NOT NULL;
CREATE INDEX expiring ON messages(mailbox, expires, tick) WHERE expires IS NOT NULL;
CREATE VIEW readable AS SELECT datetime(tick / 1000000, 'unixepoch') AS time, channel, sender, name AS "to",
        json_extract('{' || text || '}', '$.msg') AS msg FROM messages JOIN mailboxes ON mailbox = id;
CREATE INDEX threads ON messages(thread, tick) WHERE thread IS NOT NULL;
CREATE INDEX undone ON work(mailbox, due) WHERE due IS NOT NULL;
CREATE VIEW work_kept AS SELECT tick FROM work WHERE due IS NOT NULL UNION ALL
        SELECT tick FROM messages JOIN mailboxes ON mailbox = id WHERE taken > 0 AND tick > taken;
CREATE TRIGGER work_removed AFTER DELETE ON messages BEGIN DELETE FROM work WHERE tick = old.tick; END;
COMMIT;
PRAGMA user_version=3;
