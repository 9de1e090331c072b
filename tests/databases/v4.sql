BEGIN TRANSACTION;
CREATE TABLE bus(id TEXT NOT NULL, last INTEGER NOT NULL, lost INTEGER NOT NULL DEFAULT 0);
INSERT INTO "bus" VALUES('34f567fe07a951d4',1735689600889467,0);
CREATE TABLE extensions(name TEXT PRIMARY KEY, version INTEGER NOT NULL, noun TEXT NOT NULL);
INSERT INTO "extensions" VALUES('work',1,'jobs');
CREATE TABLE keys(
        tick INTEGER PRIMARY KEY, key TEXT NOT NULL, sender TEXT NOT NULL, channel TEXT NOT NULL, name TEXT NOT NULL,
        hash TEXT NOT NULL,                  -- hash_of() its text
        sum INTEGER NOT NULL);
CREATE TABLE mailboxes(
        id INTEGER PRIMARY KEY, channel TEXT NOT NULL, name TEXT NOT NULL,
        own INTEGER NOT NULL DEFAULT 0,      -- somebody reads it as their own, first name
        read INTEGER,                        -- highest cursor its owner presented; NULL before the first
        fetched INTEGER NOT NULL DEFAULT 0,  -- highest tick in an answer that was written out
        seen INTEGER NOT NULL DEFAULT 0,     -- wall clock of the last poll, us
        removed INTEGER NOT NULL DEFAULT 0, taken INTEGER NOT NULL DEFAULT 0, gone INTEGER NOT NULL DEFAULT 0,  -- highest tick that retention removed
        UNIQUE(channel, name));
INSERT INTO "mailboxes" VALUES(1,'default','pruned',1,1735689600886259,1735689600889467,1735689600892128,1735689600889467,0,4);
INSERT INTO "mailboxes" VALUES(2,'default','never-read',0,NULL,0,0,0,0,0);
INSERT INTO "mailboxes" VALUES(3,'default','fetched-only',1,0,1735689602822107,1735689602837196,0,0,0);
INSERT INTO "mailboxes" VALUES(4,'default','half-way',1,1735689602825388,1735689602835570,1735689602845467,0,0,0);
INSERT INTO "mailboxes" VALUES(5,'default','dell',1,1735689602846777,1735689602846778,1735689602851743,0,0,0);
INSERT INTO "mailboxes" VALUES(6,'default','team',0,NULL,1735689602846778,1735689602851743,0,0,0);
INSERT INTO "mailboxes" VALUES(7,'lab','all',0,NULL,0,1735689602864097,0,0,0);
INSERT INTO "mailboxes" VALUES(8,'lab','nano',1,1735689602857637,1735689602859605,1735689602864097,0,0,0);
INSERT INTO "mailboxes" VALUES(9,'default','array',0,NULL,0,0,0,0,0);
INSERT INTO "mailboxes" VALUES(10,'default','texts',0,NULL,0,0,0,0,0);
INSERT INTO "mailboxes" VALUES(11,'default','keys',0,NULL,0,0,0,0,0);
INSERT INTO "mailboxes" VALUES(12,'default','keys-too',0,NULL,0,0,0,0,0);
INSERT INTO "mailboxes" VALUES(13,'lab','keys',0,NULL,0,0,0,0,0);
INSERT INTO "mailboxes" VALUES(14,'default','short',0,NULL,0,0,0,0,0);
INSERT INTO "mailboxes" VALUES(15,'default','spark',0,NULL,0,0,0,0,0);
INSERT INTO "mailboxes" VALUES(16,'default','recalled',0,NULL,0,0,0,0,0);
INSERT INTO "mailboxes" VALUES(17,'default','queue',0,NULL,1735689602925072,1735689602949626,0,1735689602925072,0);
INSERT INTO "mailboxes" VALUES(18,'default','failing',0,NULL,1735689602952855,1735689602974162,0,1735689602952855,0);
INSERT INTO "mailboxes" VALUES(19,'default','failing.dead',0,NULL,0,0,0,0,0);
INSERT INTO "mailboxes" VALUES(20,'default','last-try',0,NULL,1735689602976854,1735689603011778,0,1735689602976854,0);
CREATE TABLE messages(
        tick INTEGER PRIMARY KEY, mailbox INTEGER NOT NULL, n INTEGER NOT NULL, sender TEXT NOT NULL,
        key TEXT, expires INTEGER, depth INTEGER NOT NULL, sum INTEGER NOT NULL, text TEXT NOT NULL, answers INTEGER, thread INTEGER);
INSERT INTO "messages" VALUES(1735689602788778,1,5,'spark',NULL,NULL,0,360075810,'"from": "spark", "channel": "default", "msg": "new 0"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602798168,1,6,'spark',NULL,NULL,0,417518269,'"from": "spark", "channel": "default", "msg": "new 1"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602803242,2,1,'spark',NULL,NULL,0,2972838266,'"from": "spark", "channel": "default", "msg": "message 0"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602807473,3,1,'spark',NULL,NULL,0,3087274988,'"from": "spark", "channel": "default", "msg": "message 0"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602811775,4,1,'dell',NULL,NULL,0,2893238743,'"from": "dell", "channel": "default", "msg": "message 0", "subject": "S0"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602817686,2,2,'spark',NULL,NULL,0,2677356478,'"from": "spark", "channel": "default", "msg": "message 1"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602822107,3,2,'spark',NULL,NULL,0,3537892798,'"from": "spark", "channel": "default", "msg": "message 1"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602825388,4,2,'dell',NULL,NULL,0,2681058379,'"from": "dell", "channel": "default", "msg": "message 1", "subject": "S1"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602827892,2,3,'spark',NULL,NULL,0,1436210151,'"from": "spark", "channel": "default", "msg": "message 2"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602834065,3,3,'spark',NULL,NULL,0,4072010236,'"from": "spark", "channel": "default", "msg": "message 2"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602835570,4,3,'dell',NULL,NULL,0,1166108188,'"from": "dell", "channel": "default", "msg": "message 2", "subject": "S2"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602846777,5,1,'spark',NULL,NULL,0,4254211051,'"from": "spark", "channel": "default", "msg": "to two", "priority": "high"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602846778,6,1,'spark',NULL,NULL,0,2064074568,'"from": "spark", "channel": "default", "msg": "to two", "priority": "high"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602852868,6,2,'spark',NULL,NULL,0,277422153,'"from": "spark", "channel": "default", "msg": "for the group"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602857637,7,1,'dell',NULL,NULL,0,2872253024,'"from": "dell", "channel": "lab", "msg": "hear me"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602859605,8,1,'dell',NULL,NULL,0,2957919775,'"from": "dell", "channel": "lab", "msg": "on another channel"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602867688,9,1,'dell',NULL,NULL,0,1246097591,'"from": "dell", "channel": "default", "msg": "0"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602867689,9,2,'dell',NULL,NULL,0,522451503,'"from": "dell", "channel": "default", "msg": "1"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602867690,9,3,'dell',NULL,NULL,0,29443518,'"from": "dell", "channel": "default", "msg": "2"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602870031,10,1,'spark',NULL,NULL,0,4026632763,'"from": "spark", "channel": "default", "msg": "line one\n\ttab \"quotes\" \\ '' / \u00e9 \u4e2d \ud83d\udc1d \u2028 -- ; );\n", "x-new": [1, {"a": null, "b": [true, 1.5, -7, "\u00e9"]}], "Msg": "", "type": "result", "content_type": "text/markdown"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602871478,11,1,'spark','k-1',NULL,0,3797160236,'"from": "spark", "channel": "default", "msg": "once"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602873876,11,2,'spark','k-2',NULL,0,1925011599,'"from": "spark", "channel": "default", "msg": "to both"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602873877,12,1,'spark','k-2',NULL,0,3417797485,'"from": "spark", "channel": "default", "msg": "to both"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602876213,13,1,'dell','k-1',NULL,0,480245784,'"from": "dell", "channel": "lab", "msg": "elsewhere", "subject": "S"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602880202,14,1,'spark',NULL,1735689602881202,0,1120019841,'"from": "spark", "channel": "default", "msg": "gone", "ttl": 0.001',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602883405,14,2,'spark',NULL,2735689602883405,0,922484080,'"from": "spark", "channel": "default", "msg": "lasting", "ttl": 1000000000.0',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602885721,5,2,'spark',NULL,NULL,0,2189004934,'"from": "spark", "channel": "default", "msg": "a question"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602887561,15,1,'dell',NULL,NULL,1,1141989539,'"from": "dell", "channel": "default", "msg": "an answer", "reply_to": "62a99ba386859"',1735689602885721,1735689602885721);
INSERT INTO "messages" VALUES(1735689602889344,5,3,'spark','thanks',NULL,2,3553041794,'"from": "spark", "channel": "default", "msg": "thank you", "reply_to": "62a99ba386f89"',1735689602887561,1735689602885721);
INSERT INTO "messages" VALUES(1735689602891053,15,2,'dell',NULL,NULL,1,231304288,'"from": "dell", "channel": "default", "msg": "another answer", "reply_to": "62a99ba386859"',1735689602885721,1735689602885721);
INSERT INTO "messages" VALUES(1735689602892519,16,1,'spark','k-3',1,0,1479373841,'"from": "spark", "channel": "default", "msg": "never mind"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602894017,16,2,'spark',NULL,NULL,0,3706831360,'"from": "spark", "channel": "default", "msg": "this one stays"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602906350,17,1,'spark',NULL,NULL,0,4271530921,'"from": "spark", "channel": "default", "msg": "done", "subject": "job done"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602910706,17,2,'spark',NULL,NULL,0,1764507036,'"from": "spark", "channel": "default", "msg": "given back", "subject": "job given back"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602913025,17,3,'spark',NULL,NULL,0,3712718231,'"from": "spark", "channel": "default", "msg": "later", "subject": "job later"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602921887,17,4,'spark',NULL,NULL,0,91335568,'"from": "spark", "channel": "default", "msg": "out", "subject": "job out"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602925072,17,5,'spark',NULL,NULL,0,2011089309,'"from": "spark", "channel": "default", "msg": "extended", "subject": "job extended"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602928519,17,6,'spark',NULL,NULL,0,2105766165,'"from": "spark", "channel": "default", "msg": "waits", "subject": "job waits"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602952855,18,1,'spark',NULL,NULL,0,448113290,'"from": "spark", "channel": "default", "msg": "failing, five times", "subject": "S"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602975277,19,1,'spark',NULL,NULL,0,2871619952,'"from": "spark", "channel": "default", "msg": "failing, five times", "subject": "S", "dead_of": "62a99ba396e97", "attempts": 5, "reason": "it does not compile"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689602976854,20,1,'spark',NULL,NULL,0,2507177287,'"from": "spark", "channel": "default", "msg": "last-try, five times", "subject": "S"',NULL,NULL);
INSERT INTO "messages" VALUES(1735689603016863,5,4,'spark','ask-1',NULL,0,677341926,'"from": "spark", "channel": "default", "msg": "anybody?"',NULL,NULL);
CREATE TABLE receipts(
        mailbox INTEGER NOT NULL, kind INTEGER NOT NULL, tick INTEGER NOT NULL,
        reader TEXT NOT NULL, at INTEGER NOT NULL, PRIMARY KEY(mailbox, kind, tick)) WITHOUT ROWID;
INSERT INTO "receipts" VALUES(1,0,1735689600889467,'pruned',1735689600891801);
INSERT INTO "receipts" VALUES(3,0,1735689602822107,'fetched-only',1735689602837763);
INSERT INTO "receipts" VALUES(4,0,1735689602835570,'half-way',1735689602842723);
INSERT INTO "receipts" VALUES(4,1,1735689602825388,'half-way',1735689602845497);
INSERT INTO "receipts" VALUES(5,0,1735689602846778,'dell',1735689602849450);
INSERT INTO "receipts" VALUES(5,1,1735689602846777,'dell',1735689602851767);
INSERT INTO "receipts" VALUES(6,0,1735689602846778,'dell',1735689602849459);
INSERT INTO "receipts" VALUES(8,0,1735689602859605,'nano',1735689602862431);
INSERT INTO "receipts" VALUES(8,1,1735689602857637,'nano',1735689602864123);
INSERT INTO "receipts" VALUES(17,0,1735689602925072,'dell',1735689602950707);
INSERT INTO "receipts" VALUES(18,0,1735689602952855,'nano',1735689602956704);
INSERT INTO "receipts" VALUES(20,0,1735689602976854,'nano',1735689602979017);
CREATE TABLE uses(token TEXT PRIMARY KEY, used INTEGER NOT NULL);
CREATE TABLE work(
        tick INTEGER PRIMARY KEY, mailbox INTEGER NOT NULL, attempt INTEGER NOT NULL,
        due INTEGER,                         -- when it can be had again, us; NULL when it is done or dead
        lease TEXT,                          -- of who has it; NULL when it was given back, or is dead
        worker TEXT NOT NULL, reason TEXT);
INSERT INTO "work" VALUES(1735689602906350,17,1,NULL,'24b5f07eb17558cc','dell',NULL);
INSERT INTO "work" VALUES(1735689602910706,17,1,1735689603440281,NULL,'dell','not mine');
INSERT INTO "work" VALUES(1735689602913025,17,1,1735693202945551,NULL,'dell','a worker gave it back');
INSERT INTO "work" VALUES(1735689602921887,17,1,1735689662947535,'be53439236bc5a17','dell',NULL);
INSERT INTO "work" VALUES(1735689602925072,17,1,1735696802951507,'ac5ccdcc71778d0e','dell',NULL);
INSERT INTO "work" VALUES(1735689602952855,18,5,NULL,NULL,'nano','it does not compile');
INSERT INTO "work" VALUES(1735689602976854,20,5,1735689663011824,'11a81906a4135390','nano',NULL);
CREATE INDEX in_order ON messages(mailbox, tick);
CREATE INDEX retries ON messages(key, sender) WHERE key IS NOT NULL;
CREATE INDEX expiring ON messages(mailbox, expires, tick) WHERE expires IS NOT NULL;
CREATE INDEX threads ON messages(thread, tick) WHERE thread IS NOT NULL;
CREATE INDEX undone ON work(mailbox, due) WHERE due IS NOT NULL;
CREATE VIEW work_kept AS SELECT tick FROM work WHERE due IS NOT NULL UNION ALL
        SELECT tick FROM messages JOIN mailboxes ON mailbox = id WHERE taken > 0 AND tick > taken;
CREATE TRIGGER work_removed AFTER DELETE ON messages BEGIN DELETE FROM work WHERE tick = old.tick; END;
CREATE INDEX retries_of_removed ON keys(key, sender);
CREATE VIEW readable AS SELECT datetime(tick / 1000000, 'unixepoch') AS time, printf('%x', tick) AS id,
        sender AS "from", name AS "to", channel, json_extract(json, '$.subject') AS subject,
        json_extract(json, '$.type') AS type, printf('%x', ifnull(thread, tick)) AS thread,
        CASE WHEN expires = 1 THEN 'recalled' WHEN name = 'all' THEN 'sent'
            WHEN own AND tick <= read THEN 'acknowledged' WHEN tick <= max(fetched, ifnull(read, 0)) THEN 'fetched'
            WHEN expires <= 1000000 * strftime('%s', 'now') THEN 'expired' ELSE 'queued' END AS state,
        CASE WHEN expires = 1 THEN NULL ELSE ifnull(json_extract(json, '$.msg'), text) END AS msg  -- text: damaged
        FROM (SELECT *, CASE WHEN expires IS NOT 1 AND json_valid('{' || text || '}') THEN '{' || text || '}' END
        AS json FROM messages) JOIN mailboxes ON mailbox = id;
COMMIT;
PRAGMA user_version=4;
